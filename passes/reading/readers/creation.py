"""Tensors made of nothing: ranges, constants, triangles of them."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from stem_compile.algebra.symbolic import Where
from stem_compile.passes.graph.normalize import Op
from stem_compile.passes.graph.values import value
from stem_compile.passes.reading.expressions import as_expr, boolean, number
from stem_compile.passes.reading.interpret import Interpreter, Reader, SymTensor
from stem_compile.passes.reading.unreadable import Unreadable


def _arange(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    bounds = [value(b) for b in op["bounds"]]
    start, step = (bounds[0], 1) if len(bounds) == 2 else (bounds[0], bounds[2]) if len(bounds) == 3 else (0, 1)
    if any(isinstance(x, float) for x in (start, step)):
        raise Unreadable("arange of floats")
    return SymTensor((None,), lambda index: as_expr(start) + as_expr(step) * index[0], "int")


def _filled(fill: Any, known: torch.Tensor) -> SymTensor:
    expr = as_expr(value(fill))
    expr = boolean(expr) if known.dtype == torch.bool else number(expr)
    return SymTensor(tuple(known.shape), lambda _: expr, "")


def _literal(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    data = op["data"]
    if known.dim() == 1 and isinstance(data, list | tuple) and len(data) == 1:
        data = data[0]
    if known.numel() != 1 or not isinstance(value(data), bool | int | float | torch.SymInt | torch.SymFloat):
        raise Unreadable("literal tensor")
    return _filled(data, known)


def _triangle(lower: bool) -> Reader:
    def read(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
        inner = i.tensor(op["input"])
        diagonal = as_expr(value(op["diagonal"]))

        def at(index: tuple[Any, ...]) -> Any:
            keep = index[-1] <= index[-2] + diagonal if lower else index[-1] >= index[-2] + diagonal
            inside = inner.at(index)
            return (
                sympy.And(keep, boolean(inside))
                if known.dtype == torch.bool
                else Where(keep, number(inside), sympy.Integer(0))
            )

        return SymTensor(inner.shape, at, inner.kind)

    return read


READERS: dict[str, Reader] = {
    "arange": _arange,
    **dict.fromkeys(("ones", "new_ones", "ones_like"), lambda i, op, known: _filled(1, known)),
    "fill": lambda i, op, known: _filled(op["value"], known),
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like", "zero"), lambda i, op, known: _filled(0, known)),
    **dict.fromkeys(("full", "new_full", "full_like"), lambda i, op, known: _filled(op["fill_value"], known)),
    "tensor": _literal,
    "scalar_tensor": _literal,
    "tril": _triangle(True),
    "triu": _triangle(False),
}
