"""Differences and running sums of what is known."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from stem_compile.algebra import symbolic
from stem_compile.algebra.symbolic import Where
from stem_compile.passes.graph.normalize import Op
from stem_compile.passes.reading.expressions import is_one, loads, number
from stem_compile.passes.reading.interpret import Interpreter, Reader, SymTensor
from stem_compile.passes.reading.unreadable import Unreadable


def _diff(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    inner = i.tensor(op["input"])
    dim = op["dim"] % len(inner.shape)
    if op["n"] != 1 or op["append"] is not None or known.dtype == torch.bool:
        raise Unreadable("diff of another order, or of conditions")
    before = None if op["prepend"] is None else i.tensor(op["prepend"])
    if before is not None and not is_one(before.shape[dim]):
        raise Unreadable("diff with a longer prepend")

    def at(index: tuple[Any, ...]) -> Any:
        def step(place: Any) -> Any:
            return (*index[:dim], place, *index[dim + 1 :])

        place = index[dim]
        if before is None:
            return number(inner.at(step(place + 1))) - number(inner.at(step(place)))
        first = number(inner.at(step(sympy.Integer(0)))) - number(before.at(step(sympy.Integer(0))))
        later = number(inner.at(step(place))) - number(inner.at(step(place - 1)))
        first, later = symbolic.expand(first), symbolic.expand(later)
        if loads(first) or loads(later):
            raise Unreadable("diff of runtime values")
        return later if first == later else Where(sympy.Eq(place, 0), first, later)

    # Raises here, not later, when the values are only known at run time.
    at(tuple(sympy.Symbol(f"_p{n}", integer=True, nonnegative=True) for n in range(len(inner.shape))))
    return SymTensor(inner.shape, at, "int")


def _cumsum(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    inner = i.tensor(op["input"])
    dim = op["dim"] % len(inner.shape)
    index = tuple(sympy.Symbol(f"_c{n}", integer=True, nonnegative=True) for n in range(len(inner.shape)))
    term = number(inner.at(index))
    if sympy.sympify(term).has(index[dim]) or loads(term):
        raise Unreadable("cumsum of values that change along it")
    return SymTensor(inner.shape, lambda at: number(inner.at(at)) * (at[dim] + 1), "int")


READERS: dict[str, Reader] = {"diff": _diff, "cumsum": _cumsum}
