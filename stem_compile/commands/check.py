"""``stem-compile check``: property-test the model that TARGET names, and print the verdict."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stem_compile.commands.arguments import (
    INTERRUPTED,
    add_json,
    add_target,
    at_least,
    backend_options,
    place,
    writable_file,
)
from stem_compile.packages import UserError, need

if TYPE_CHECKING:
    import torch

    from stem_compile.bench.target import Target
    from stem_compile.bench.terminal import Progress, Table
    from stem_compile.testing.report import Report

HELP = "property-test a model: the same as without the backend, and how far off at your budget? Exit status 3 if not"
TEXT_TOKENS = 1024
"""Tokens of --text that the fidelity report reads."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_target(parser)
    parser.add_argument(
        "-p",
        "--property",
        action="append",
        metavar="NAME",
        help="property to check; may be repeated (default: all)",
    )
    parser.add_argument(
        "--examples",
        type=at_least(1),
        metavar="N",
        help="examples of each property (default: its own number; 2 for large models)",
    )
    parser.add_argument(
        "--minutes",
        type=at_least(0, float),
        metavar="M",
        help="time for all examples but each property's first (default: 2.5 for large models, else no limit)",
    )
    parser.add_argument(
        "--expected", type=at_least(0), metavar="N", help="attentions that must be rewritten (default: all)"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="text for the fidelity report (default: random tokens)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the examples (default: 0)")
    parser.add_argument(
        "--as-deployed",
        action="store_true",
        help="your own block sizes, minimum length, inner backend and mode, with few examples at real lengths",
    )
    parser.add_argument("--profile", choices=("ci", "thorough"), default="ci", help="how many examples (default: ci)")
    parser.add_argument(
        "--database",
        type=Path,
        default=Path(".stem-compile"),
        metavar="DIR",
        help="folder of failures, which the next check tries first (default: .stem-compile)",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the report to this file")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Check, print, write, after Ctrl-C what there is by then. Status 3 unless the model passes."""
    need("torch", "hypothesis")
    from stem_compile.bench.terminal import Progress, width

    device, dtype = place(arguments)
    options = backend_options(arguments.option)
    if arguments.html is not None:
        need("jinja2")
        writable_file(arguments.html, "--html")
    if arguments.text is not None and not arguments.text.is_file():
        raise UserError(f"--text {arguments.text}: no such file")
    _known(arguments.property or ())
    progress = Progress()
    progress.doing("loading")
    try:
        report = checked(arguments, device, dtype, options, progress)
    finally:
        progress.close()
    if arguments.html is not None:
        report.write(arguments.html)
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2, default=str))
    else:
        print(table(report).text(width()), report.conditions, *report.failure_lines(), "", report.verdict, sep="\n")
    return INTERRUPTED if report.stopped else 0 if report.passed else 3


def _known(names: Any) -> None:
    from stem_compile.testing import properties

    try:
        for name in names:
            properties.get(name)
    except ValueError as error:
        raise UserError(f"--property: {error}") from None


def checked(
    arguments: argparse.Namespace, device: str, dtype: torch.dtype, options: dict[str, Any], progress: Progress
) -> Report:
    """The report on the target. Raises UserError for what the user can mend."""
    from stem_compile.bench.machine import describe, versions
    from stem_compile.bench.target import load
    from stem_compile.testing import check_model
    from stem_compile.testing.inputs import NoInputs
    from stem_compile.testing.report import CheckInterrupted

    target = load(arguments.target, device, dtype)
    at_work: list[str] = []

    def tell(name: str, done: int, total: int) -> None:
        if at_work and at_work[-1] != name:
            progress.finished(f"{at_work[-1]}: checked")
        at_work.append(name)
        progress.doing(f"{name}: example {done} of {total}")

    try:
        report = check_model(
            target.model,
            target.make_inputs,
            options=options,
            properties=arguments.property,
            max_examples=arguments.examples,
            expected=arguments.expected,
            seed=arguments.seed,
            seconds=None if arguments.minutes is None else 60 * arguments.minutes,
            text=None if arguments.text is None else _tokens(target, arguments.text),
            as_deployed=arguments.as_deployed,
            profile=arguments.profile,
            database=arguments.database,
            progress=tell,
        )
    except CheckInterrupted as interrupted:
        report = interrupted.report
    except (NoInputs, ValueError) as error:
        raise UserError(str(error)) from None
    report.settings |= {"machine": describe(device), "versions": versions()}
    report.imports = [
        "import torch",
        "from stem_compile.bench.target import load",
        "",
        f"target = load({arguments.target!r}, {device!r}, {dtype})",
        "model, make_inputs = target.model, target.make_inputs",
    ]
    return report


def _tokens(target: Target, text: Path) -> torch.Tensor:
    ids: torch.Tensor = target.tokenizer()(text.read_text(), return_tensors="pt").input_ids[:, :TEXT_TOKENS]
    return ids


def table(report: Report) -> Table:
    """The report for a terminal."""
    from stem_compile.bench.terminal import Table
    from stem_compile.testing.report import MARKS

    columns = ("property", "", "examples", "of tolerance", "what it says")
    rows = []
    for result in report.results:
        remark = f" ({result.remark})" if result.remark and result.verdict != "fail" else ""
        worst = f"{result.worst:.2f}" if result.worst else "-"
        rows.append((result.name, MARKS[result.verdict], result.tried, worst, result.title + remark))
    return Table(report.headline, columns, rows, left=("", "what it says"))
