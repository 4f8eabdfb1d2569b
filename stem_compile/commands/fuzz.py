"""``stem-compile fuzz``: random programs of attentions against themselves, with a short table last."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stem_compile.commands.arguments import at_least, place, writable_file, writable_folder
from stem_compile.packages import need

if TYPE_CHECKING:
    from stem_compile.testing.fuzz.campaign import Plan, Tally

HELP = "random programs of attentions against themselves: wrong, raised, left dense, refused or rewritten?"
MINUTES = 10.0
EVERY = 20.0
"""Seconds between two lines of progress."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--minutes",
        type=at_least(0, float, above=True),
        metavar="M",
        help=f"time for all programs (default: {MINUTES:g}, or no limit with --programs)",
    )
    parser.add_argument(
        "--programs", type=at_least(1), metavar="N", help="programs to try (default: as many as there is time for)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the programs (default: 0)")
    parser.add_argument(
        "--first", type=at_least(0), default=0, metavar="N", help="number of the first program (default: 0)"
    )
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--inner",
        choices=("mixed", "eager", "inductor"),
        default="mixed",
        help="the inner backend; mixed: one program in fifty under Inductor (default: mixed)",
    )
    parser.add_argument("--jobs", type=at_least(1), default=1, metavar="J", help="processes (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write counts and failures to this file")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("out/fuzz"),
        metavar="DIR",
        help="folder for the scripts of failures (default: out/fuzz)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the campaign. Status 3 when a program shows a defect."""
    need("torch", "hypothesis")
    arguments.dtype = ""
    place(arguments)
    writable_folder(arguments.out, "--out")
    if arguments.json is not None:
        writable_file(arguments.json, "--json")
    from stem_compile.bench.machine import describe, environment
    from stem_compile.testing.fuzz.campaign import Plan, campaign, table, write

    minutes = MINUTES if arguments.minutes is None and arguments.programs is None else arguments.minutes
    plan = Plan(
        seed=arguments.seed,
        programs=arguments.programs,
        seconds=None if minutes is None else 60 * minutes,
        device=arguments.device,
        inner=arguments.inner,
        jobs=arguments.jobs,
        out=str(arguments.out),
        first=arguments.first,
    )
    facts = environment()
    tally = campaign(plan, _Telling(plan, arguments.json, facts))
    if arguments.json is not None:
        write(tally, plan, arguments.json, facts)
    print(table(tally, plan, describe(arguments.device)))
    return 3 if tally.bad else 0


class _Telling:
    """A line on stderr now and then, and the counts so far in the file."""

    def __init__(self, plan: Plan, path: Path | None, facts: dict[str, Any]) -> None:
        self._plan, self._path, self._facts, self._last = plan, path, facts, time.monotonic()

    def __call__(self, tally: Tally) -> None:
        if time.monotonic() - self._last < EVERY:
            return
        self._last = time.monotonic()
        wanted = f" of {self._plan.programs}" if self._plan.programs else ""
        counts = (
            f"{tally.programs}{wanted} programs in {tally.seconds:.0f} s, {tally.bad} bad, {tally.share:.1%} rewritten"
        )
        print(counts, file=sys.stderr, flush=True)
        if self._path is not None:
            from stem_compile.testing.fuzz.campaign import write

            write(tally, self._plan, self._path, self._facts)
