"""What ``stem-compile check`` does: load the model that TARGET names, check it with a progress bar, print the verdict."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stem_compile.demo.packages import Mendable, need
from stem_compile.demo.target import load
from stem_compile.testing import check_model
from stem_compile.testing.inputs import NoInputs
from stem_compile.testing.report import MARKS, Report

WEIGHTS = (".safetensors", ".bin", ".gguf")


def model_of(target: str, device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, Any]:
    """(model, make_inputs) of a transformers id or folder, a GGUF file or a folder with one, or ``package.module:factory``.

    A folder with a config.json and no weights gives random ones, the same every time.
    factory() gives a model, or (model, make_inputs) with a function or an example batch as in ``check_model``; factory(tokens) gives (model, args) or
    (model, args, kwargs), which are an example batch. Raises Mendable.
    """
    if ":" in target and not Path(target).exists():
        return _made(target, device, dtype)
    path = Path(target)
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise Mendable(f"{target}: a folder with a config.json or exactly one .gguf file, not {len(files)}")
        target = str(files[0])
    elif path.is_dir() and not any(f.suffix in WEIGHTS for f in path.iterdir()):
        return _random(target, device, dtype), None
    return load(target, device, dtype).model, None


def _random(folder: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
    need("transformers")
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder)
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise Mendable(f"{folder}: {str(error).splitlines()[0]}") from error
    model.config.name_or_path = f"{folder}, random weights"
    return model.to(device, dtype).eval()  # type: ignore[no-any-return]


def _made(target: str, device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, Any]:
    module, _, name = target.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise Mendable(f"{target}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    made = factory(256) if any(p.default is p.empty for p in inspect.signature(factory).parameters.values()) else factory()
    model, inputs = made, None
    if isinstance(made, tuple):
        model, inputs = made[0], (made[1] if len(made) == 2 else (made[1], made[2]))
    if not isinstance(model, torch.nn.Module):
        raise Mendable(f"{target} gave a {type(model).__name__}: it must give a torch.nn.Module, or a tuple that begins with one")
    return model.to(device, dtype).eval(), _placed(inputs, device, dtype)


def _placed(inputs: Any, device: str, dtype: torch.dtype) -> Any:
    def move(x: Any) -> Any:
        return x.to(device, dtype if x.is_floating_point() else x.dtype) if isinstance(x, torch.Tensor) else x

    if callable(inputs):
        return functools.wraps(inputs)(lambda *args: torch.utils._pytree.tree_map(move, inputs(*args)))
    return torch.utils._pytree.tree_map(move, inputs)


def check(target: str, device: str, dtype: torch.dtype, text: Path | None, tell: Callable[[str, int, int], None], **arguments: Any) -> Report:
    """The report on ``target``. tell: progress. Raises Mendable for what the user can mend."""
    need("hypothesis")
    model, make_inputs = model_of(target, device, dtype)
    try:
        report = check_model(model, make_inputs, text=_tokens(text, target) if text else None, progress=tell, **arguments)
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

    if not text.is_file():
        raise Mendable(f"no such file: {text}")
    path = Path(target)
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf")) if path.is_dir() and not (path / "tokenizer.json").exists() else []
    try:
        source, extra = (str(files[0].parent), {"gguf_file": files[0].name}) if files else (target, {})
        tokenizer = AutoTokenizer.from_pretrained(source, **extra)
    except (OSError, ValueError) as error:
        raise Mendable(f"--text needs the model's tokenizer: {str(error).splitlines()[0]}") from error
    ids: torch.Tensor = tokenizer(text.read_text(), return_tensors="pt").input_ids[:, :1024]
    return ids


def table(report: Report) -> Any:
    """The report for a terminal."""
    from rich.table import Table

    drawn = Table(title=report.headline, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name, side in (("property", "left"), ("", "left"), ("examples", "right"), ("worst/budget", "right"), ("what it says", "left")):
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
