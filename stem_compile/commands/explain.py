"""``stem-compile explain``."""

from __future__ import annotations

import argparse
import json

from stem_compile.commands.arguments import add_json, add_target, add_tokens, backend_options, place
from stem_compile.packages import need

HELP = "every attention of a model: what its mask means, whether it is rewritten, and if not, why"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_target(parser)
    add_tokens(parser, "8192, or what the model has positions for")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Load, run once, print."""
    need("torch")
    import torch

    from stem_compile.bench.target import load
    from stem_compile.explanation import explain

    device, dtype = place(arguments)
    options = backend_options(arguments.option)
    target = load(arguments.target, device, dtype)
    tokens = arguments.tokens or min(8192, target.longest)
    args, kwargs = target.inputs(tokens)
    try:
        with torch.inference_mode():
            explanation = explain(target.model, options)(*args, **kwargs)
    except Exception as error:
        if (own := target.explain_failure(tokens, error)) is not None:
            raise own from error
        raise
    print(json.dumps(explanation.to_dict(), indent=2) if arguments.json else explanation)
    return 0
