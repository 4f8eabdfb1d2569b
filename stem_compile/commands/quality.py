"""``stem-compile quality``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

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
from stem_compile.packages import UserError, need

HELP = "what sparse attention changes in a model's answers, at several budgets: KL, NLL, top-1, pass keys, layers"
BUDGETS = (0.5, 0.25, 0.125)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_target(parser)
    add_tokens(parser, "4096 on a CPU, 16384 on a GPU, or what the model has positions for")
    add_texts(parser)
    parser.add_argument(
        "--budget",
        type=float,
        action="append",
        metavar="PART",
        help="part of the attention to compute; may be repeated (default: 0.5, 0.25 and 0.125)",
    )
    parser.add_argument("--no-keys", action="store_true", help="leave the map of pass keys out, the longest part")
    parser.add_argument(
        "--repeats", type=at_least(1), default=3, metavar="N", help="timed runs of each budget (default: 3)"
    )
    add_out(parser, "quality.json, quality.png and quality.html")
    add_json(parser)


def add_texts(parser: argparse.ArgumentParser) -> None:
    """--text FILE, which may be repeated."""
    parser.add_argument(
        "--text",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="text to read; may be repeated (default: two parts of Python's documentation)",
    )


def check_texts(files: list[Path]) -> None:
    """Raise UserError for the first of ``files`` that is not there."""
    for file in files:
        if not file.is_file():
            raise UserError(f"--text {file}: no such file")


def run(arguments: argparse.Namespace) -> int:
    """Load, measure part by part, print and write."""
    need("torch")
    from stem_compile.bench import quality, report
    from stem_compile.bench.machine import settings
    from stem_compile.bench.quality_report import Quality
    from stem_compile.bench.samples import samples
    from stem_compile.bench.target import load
    from stem_compile.bench.terminal import Progress, width

    device, dtype = place(arguments)
    options = backend_options(arguments.option)
    budgets = arguments.budget or list(BUDGETS)
    backend_options([f"budget={part}" for part in budgets])
    check_texts(arguments.text)
    folder, remark = out_folder(arguments)
    target = load(arguments.target, device, dtype)
    tokens = arguments.tokens or min(16384 if device.startswith("cuda") else 4096, target.longest)
    texts = samples(target, arguments.text, tokens, device)
    hays = [] if arguments.no_keys else quality.haystacks(target, [tokens // 2, tokens])
    entered = quality.contenders(budgets, options)
    progress, status, outcomes = Progress(quality.parts(texts, hays, entered)), 0, list[quality.Outcome]()
    try:
        steps = quality.measure(target, texts, hays, entered, arguments.repeats, device, progress.doing)
        for what, so_far in steps:
            outcomes = so_far
            progress.finished(what)
    except KeyboardInterrupt:
        print(f"stopped: {progress.done} of {progress.total} parts are finished", file=sys.stderr)
        status = INTERRUPTED
    finally:
        progress.close()
    facts = settings(arguments.target, device, dtype, options, stopped=bool(status))
    complete = [o for o in outcomes if len(o.texts) == len(texts)]
    measured = Quality(facts | {"texts": [t.name for t in texts], "tokens": tokens}, complete)
    if len(complete) > 1:
        report.write(measured, folder, "quality", drawn=not remark)
    if arguments.json:
        print(json.dumps(measured.to_dict(), indent=2))
        return status
    if complete:
        print(measured.table().text(width()), measured.words, sep="\n")
    if len(complete) > 1:
        print(report.written(folder, "quality", drawn=not remark))
    if remark:
        print(remark, file=sys.stderr)
    return status
