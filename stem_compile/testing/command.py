"""What ``stem-compile check`` does: load the model that TARGET names, check it with a progress bar, print the
verdict."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stem_compile.bench.factory import factory_of, is_factory, placed, ready
from stem_compile.bench.packages import Mendable, need
from stem_compile.bench.target import causal_lm, first_line
from stem_compile.testing import check_model
from stem_compile.testing import properties as catalogue
from stem_compile.testing.inputs import NoInputs
from stem_compile.testing.report import MARKS, Report


def model_of(target: str, device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, Any]:
    """(model, make_inputs) of what ``demo.target`` loads, or of ``package.module:factory``.

    factory() gives a model, or (model, make_inputs) with a function or an example batch as in ``check_model``;
    factory(tokens) gives (model, args) or (model, args, kwargs), which are an example batch. Raises Mendable.
    """
    if not is_factory(target):
        return causal_lm(target, device, dtype), None
    factory, takes_tokens = factory_of(target)
    made = factory(256) if takes_tokens else factory()
    model, *inputs = made if isinstance(made, tuple) and made else (made,)
    given = tuple(inputs) if len(inputs) > 1 else inputs[0] if inputs else None
    return ready(target, model, device, dtype), _placed(given, device, dtype)


def _placed(inputs: Any, device: str, dtype: torch.dtype) -> Any:
    if callable(inputs):
        return functools.wraps(inputs)(lambda *args: placed(inputs(*args), device, dtype))
    return placed(inputs, device, dtype)


def check(
    target: str,
    device: str,
    dtype: torch.dtype,
    text: Path | None,
    tell: Callable[[str, int, int], None],
    **arguments: Any,
) -> Report:
    """The report on ``target``. tell: progress. Raises Mendable for what the user can mend."""
    need("hypothesis")
    if text is not None and not text.is_file():
        raise Mendable(f"--text {text}: no such file")
    try:
        for name in arguments["properties"] or ():
            catalogue.get(name)
    except ValueError as error:
        raise Mendable(f"--property: {error}") from None
    model, make_inputs = model_of(target, device, dtype)
    try:
        report = check_model(
            model, make_inputs, text=_tokens(text, target) if text else None, progress=tell, **arguments
        )
    except (NoInputs, ValueError) as error:
        raise Mendable(str(error)) from None
    report.imports = [
        "import torch",
        "from stem_compile.testing.command import model_of",
        "",
        f"model, make_inputs = model_of({target!r}, {device!r}, {dtype})",
    ]
    return report


def _tokens(text: Path, target: str) -> torch.Tensor:
    from transformers import AutoTokenizer

    path = Path(target)
    files = (
        [path]
        if path.suffix == ".gguf"
        else sorted(path.glob("*.gguf"))
        if path.is_dir() and not (path / "tokenizer.json").exists()
        else []
    )
    try:
        source, extra = (str(files[0].parent), {"gguf_file": files[0].name}) if files else (target, {})
        tokenizer = AutoTokenizer.from_pretrained(source, **extra)
    except (OSError, ValueError) as error:
        raise Mendable(f"--text needs the model's tokenizer: {first_line(error)}") from error
    ids: torch.Tensor = tokenizer(text.read_text(), return_tensors="pt").input_ids[:, :1024]
    return ids


def table(report: Report) -> Any:
    """The report for a terminal."""
    from rich.table import Table

    drawn = Table(title=report.headline, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name, side in (
        ("property", "left"),
        ("", "left"),
        ("examples", "right"),
        ("worst/budget", "right"),
        ("what it says", "left"),
    ):
        drawn.add_column(name, justify=side)  # type: ignore[arg-type]
    colours = {"pass": "green", "fail": "bold red", "not applicable": "dim"}
    for r in report.results:
        remark = f"\n[dim]{r.remark.replace('[', chr(92) + '[')}[/dim]" if r.remark and r.verdict != "fail" else ""
        mark = f"[{colours[r.verdict]}]{MARKS[r.verdict]}[/]"
        drawn.add_row(r.name, mark, r.tried, f"{r.worst:.2f}" if r.worst else "-", r.title + remark)
    return drawn


def show(report: Report, console: Any) -> None:
    """Table, failures and verdict. Snippets are printed as they are, for the clipboard."""
    console.print(table(report))
    for line in report.failure_lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print()
    console.print(report.verdict, style="bold green" if report.passed else "bold red", markup=False, highlight=False)
