"""``stem-compile bench``."""

from __future__ import annotations

import argparse
import json
import sys

from stem_compile.commands.arguments import (
    INTERRUPTED,
    add_json,
    add_out,
    add_target,
    add_tokens,
    at_least,
    backend_options,
    out_folder,
    place,
)
from stem_compile.packages import need

HELP = "time a model's prefill over prompt lengths: eager, Inductor and Stem"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_target(parser)
    add_tokens(parser, "from where the options make attention sparse, and twice that", repeated=True)
    parser.add_argument(
        "--repeats",
        type=at_least(1),
        default=3,
        metavar="N",
        help="timed runs of each contender at each length (default: 3)",
    )
    add_out(parser, "bench.json, bench.png and bench.html")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Load, time in turns, print and write."""
    need("torch")
    from stem_compile.bench import report, speed
    from stem_compile.bench.contender import RIVALS
    from stem_compile.bench.machine import settings
    from stem_compile.bench.target import load
    from stem_compile.bench.terminal import Progress, width
    from stem_compile.bench.units import seconds

    device, dtype = place(arguments)
    options = backend_options(arguments.option)
    folder, remark = out_folder(arguments)
    target = load(arguments.target, device, dtype)
    lengths = arguments.tokens or speed.lengths(target, options)
    results: list[speed.Length] = []
    progress, status = Progress(len(lengths)), 0
    try:
        for result in speed.bench(target, lengths, options, arguments.repeats, device, progress.doing):
            results.append(result)
            stem = result.rows[-1]
            progress.finished(
                f"{result.tokens:,} tokens: eager {seconds(result.rows[0].seconds)}, {RIVALS[-1].name}"
                f" {seconds(result.rows[-2].seconds)}, stem {seconds(stem.seconds)} ({stem.speedup:.2f}x)"
            )
    except KeyboardInterrupt:
        print(f"stopped: {len(results)} of {len(lengths)} lengths are finished", file=sys.stderr)
        status = INTERRUPTED
    finally:
        progress.close()
    measured = speed.Speed(settings(arguments.target, device, dtype, options, stopped=bool(status)), results)
    if results:
        report.write(measured, folder, "bench", drawn=not remark)
    if arguments.json:
        print(json.dumps(measured.to_dict(), indent=2))
        return status
    if results:
        print(measured.table().text(width()))
        print(*measured.remarks(), sep="\n")
        print(report.written(folder, "bench", drawn=not remark))
    if remark:
        print(remark, file=sys.stderr)
    return status
