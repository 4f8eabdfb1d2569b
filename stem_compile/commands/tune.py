"""``stem-compile tune``."""

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
from stem_compile.commands.quality import add_texts, check_texts
from stem_compile.packages import need

HELP = "find the fastest options whose answers stay within a bound on your text, and save them as JSON"
MAX_KL = 0.02
"""Bound on the KL divergence where the user gives none, nats."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_target(parser)
    add_tokens(parser, "4096 on a CPU, 16384 on a GPU, or what the model has positions for")
    add_texts(parser)
    parser.add_argument(
        "--max-kl",
        type=at_least(0, float, above=True),
        metavar="NATS",
        help=f"most KL divergence from dense attention, second half of the worst text (default: {MAX_KL})",
    )
    parser.add_argument(
        "--max-nll",
        type=at_least(0, float, above=True),
        metavar="NATS",
        help="most change of the negative log-likelihood, likewise",
    )
    parser.add_argument(
        "--repeats", type=at_least(1), default=3, metavar="N", help="timed runs at the end (default: 3)"
    )
    add_out(parser, "options.json, tune.json, tune.png and tune.html")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Load, search, print and write. Status 3 where no setting is within the bound and faster than dense."""
    need("torch")
    from stem_compile.bench import report
    from stem_compile.bench.machine import settings
    from stem_compile.bench.samples import samples
    from stem_compile.bench.target import load
    from stem_compile.bench.terminal import Progress, width
    from stem_compile.bench.tune import Bound, Tuner, steps, tune
    from stem_compile.bench.tune_report import Tuning

    device, dtype = place(arguments)
    options = backend_options(arguments.option)
    check_texts(arguments.text)
    folder, remark = out_folder(arguments)
    limit = MAX_KL if arguments.max_kl is None and arguments.max_nll is None else arguments.max_kl
    bound = Bound(limit, arguments.max_nll)
    target = load(arguments.target, device, dtype)
    tokens = arguments.tokens or min(16384 if device.startswith("cuda") else 4096, target.longest)
    texts = samples(target, arguments.text, tokens, device)
    tuner = Tuner(target, texts, bound, device)
    progress, stopped = Progress(steps(options)), False
    try:
        for what in tune(tuner, options, arguments.repeats, progress.doing):
            progress.finished(what)
    except KeyboardInterrupt:
        print(f"stopped after {len(tuner.search.trials)} settings", file=sys.stderr)
        stopped = True
    finally:
        progress.close()
    facts = settings(arguments.target, device, dtype, options, stopped)
    tuning = Tuning(facts | {"texts": [t.name for t in texts], "tokens": tokens}, bound, tuner.search)
    if tuner.search.trials:
        report.write(tuning, folder, "tune", drawn=not remark)
    if tuning.options is not None:
        (folder / "options.json").write_text(json.dumps(tuning.options, indent=2) + "\n")
    if arguments.json:
        print(json.dumps(tuning.to_dict(), indent=2))
    elif tuner.search.trials:
        print(tuning.table().text(width()), "", tuning.words(), "not tested:", sep="\n")
        print(*(f"  {line}" for line in tuning.untested()), sep="\n")
        print(report.written(folder, "tune", drawn=not remark))
        if tuning.options is not None:
            print(f"options: {folder / 'options.json'}, for -o @{folder / 'options.json'} or options=json.load(...)")
    if remark:
        print(remark, file=sys.stderr)
    return INTERRUPTED if stopped else 0 if tuning.options is not None else 3
