"""Python that builds inputs like given ones, short enough to paste."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stem_compile.testing.case import Inputs
from stem_compile.testing.subject import Subject, brief

SHORT = 16
"""Elements up to which a tensor is written out."""


def written(subject: Subject, inputs: Inputs, fails: Callable[[Inputs], bool]) -> str:
    """A script that calls ``assert_equivalent`` with inputs that fail: random ones of these shapes where those fail
    too, else the very ones from a file."""
    given = brief(subject.options)
    call = ["from stem_compile.testing import assert_equivalent", ""]
    names = [f"arg{i}" for i in range(len(inputs.args))] + list(inputs.kwargs)
    values = [*inputs.args, *inputs.kwargs.values()]
    passed = ", ".join([f"arg{i}" for i in range(len(inputs.args))] + [f"{k}={k}" for k in inputs.kwargs])
    final = f"assert_equivalent(model, {passed}, options={given!r})"
    texts = [_text(v) for v in values]
    if all(t is not None for t in texts):
        space: dict[str, Any] = {"torch": torch}
        torch.manual_seed(0)
        lines = [f"{n} = {t}" for n, t in zip(names, texts)]
        exec("\n".join(lines), space)
        if fails(
            Inputs(
                tuple(space[n] for n in names[: len(inputs.args)]), {k: space[k] for k in inputs.kwargs}, inputs.valid
            )
        ):
            return "\n".join(["import torch", *call, "torch.manual_seed(0)", *lines, final])
    path = Path(tempfile.mkdtemp(prefix="stem-compile-")) / "inputs.pt"
    torch.save({"args": inputs.args, "kwargs": inputs.kwargs}, path)
    loaded = f'saved = torch.load("{path}", weights_only=False)  # random inputs of these shapes do not fail'
    return "\n".join(
        [
            "import torch",
            *call,
            loaded,
            f'assert_equivalent(model, *saved["args"], options={given!r}, **saved["kwargs"])',
        ]
    )


def _text(value: Any) -> str | None:
    """An expression for a value like this one, None where there is none."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if not isinstance(value, torch.Tensor):
        return None
    where = "" if value.device.type == "cpu" else f', device="{value.device}"'
    shape = tuple(value.shape)
    if value.is_floating_point():
        return f"torch.randn({shape}, dtype={value.dtype}{where})"
    if value.numel() <= SHORT:
        return f"torch.tensor({value.tolist()}, dtype={value.dtype}{where})"
    if bool((value == value.flatten()[0]).all()):
        return f"torch.full({shape}, {value.flatten()[0].item()}, dtype={value.dtype}{where})"
    if value.dtype == torch.bool or set(value.unique().tolist()) == {0, 1}:
        return _mask_text(value, where)
    return f"torch.randint({int(value.min())}, {int(value.max()) + 1}, {shape}, dtype={value.dtype}{where})"


def _mask_text(value: torch.Tensor, where: str) -> str | None:
    """A padding mask by where each row's ones begin and end."""
    if value.dim() != 2:
        return None
    spans = [(int(r.nonzero()[0]), int(r.nonzero()[-1]) + 1) for r in value if bool(r.any())]
    positions = f"torch.arange({value.shape[1]}{where})"
    again = torch.arange(value.shape[1], device=value.device)
    if len(spans) != len(value) or not torch.equal(
        torch.stack([(again >= a) & (again < b) for a, b in spans]).to(value.dtype), value
    ):
        return None
    rows = ", ".join(f"({positions} >= {a}) & ({positions} < {b})" for a, b in spans)
    return f"torch.stack([{rows}]).to({value.dtype})"
