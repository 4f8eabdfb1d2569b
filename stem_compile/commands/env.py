"""``stem-compile env``: versions, devices, kernels and caches, for the report of a bug."""

from __future__ import annotations

import argparse
import json

from stem_compile.commands.arguments import add_json

HELP = "versions, devices, kernels and caches, for the report of a bug"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print what is known of this environment; what is missing is said and is no error."""
    from stem_compile.bench.machine import environment

    facts = environment()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    names = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name.ljust(names)}  {'not installed' if value is None else value}")
    return 0
