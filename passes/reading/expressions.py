"""Expressions of tensor elements: numbers and conditions turned into each other, cases of choices, indices that
broadcast."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import sympy
import torch

from stem_compile.algebra import symbolic
from stem_compile.algebra.symbolic import Where
from stem_compile.passes.reading.sizes import size_expr
from stem_compile.passes.reading.unreadable import Unreadable

HIDDEN = -1.0e39
"""What -inf is read as: a number that arithmetic survives, below every finite fp32. Floats are read as the fractions
they are: -1e4 beside it must not be rounded away."""

CASES = 3
"""Most choices of an expression that a comparison is taken through one by one."""


def kind_of(dtype: torch.dtype) -> str:
    """Arithmetic that a dtype follows."""
    return "bool" if dtype == torch.bool else "float" if dtype.is_floating_point else "int"


def as_expr(number: Any) -> Any:
    """Sympy expression of an int, bool, float, SymInt or SymFloat."""
    if isinstance(number, bool):
        return sympy.true if number else sympy.false
    if isinstance(number, torch.SymInt | torch.SymFloat):
        return size_expr(number)
    if isinstance(number, float):
        if number != number:
            raise Unreadable("NaN")
        return sympy.Rational(
            number if abs(number) <= torch.finfo(torch.float32).max else math.copysign(HIDDEN, number)
        )
    if isinstance(number, int):
        return sympy.Integer(number)
    raise Unreadable(f"scalar of type {type(number).__name__}")


def boolean(expr: Any) -> Any:
    """Truth value of an expression: a condition stays, a number is compared with zero."""
    if (
        expr in (sympy.true, sympy.false)
        or getattr(expr, "is_Relational", False)
        or isinstance(expr, sympy.logic.boolalg.Boolean)
    ):
        return expr
    return decided(lambda n: sympy.Ne(n, 0), expr)


def decided(relation: Callable[[Any], Any], expr: Any) -> Any:
    """``relation(expr)``, asked in each case of the few choices that the expression holds: conditions turned into
    numbers are conditions again."""
    choices = sorted(expr.atoms(Where), key=sympy.default_sort_key)
    if not 0 < len(choices) <= CASES:
        return relation(expr)
    choice = next(c for c in choices if not any(c != other and other.has(c) for other in choices))
    condition, *ends = choice.args
    yes, no = (decided(relation, expr.xreplace({choice: end})) for end in ends)
    return sympy.Or(sympy.And(condition, yes), sympy.And(sympy.Not(condition), no))


def number(expr: Any) -> Any:
    """Numeric value of an expression: a condition counts 1 or 0."""
    if expr in (sympy.true, sympy.false):
        return sympy.Integer(expr == sympy.true)
    if isinstance(expr, sympy.logic.boolalg.Boolean) and not isinstance(expr, sympy.Symbol):
        return Where(expr, sympy.Integer(1), sympy.Integer(0))
    return expr


def by_cases(function: Callable[..., Any], *exprs: Any) -> Any:
    """``function(*exprs)`` in each case of the few choices that the expressions hold: a choice between the results."""
    choices = sorted(set().union(*(sympy.sympify(e).atoms(Where) for e in exprs)), key=sympy.default_sort_key)
    if not 0 < len(choices) <= CASES:
        return function(*exprs)
    choice = next(c for c in choices if not any(c != other and other.has(c) for other in choices))
    condition, *ends = choice.args
    yes, no = (by_cases(function, *(e.xreplace({choice: end}) for e in exprs)) for end in ends)
    return yes if yes == no else Where(condition, yes, no)


def loads(expr: Any) -> bool:
    """Whether an expression reads a tensor that the graph really computes."""
    return any(symbolic.load_index(f) is not None for f in sympy.sympify(expr).atoms(sympy.core.function.AppliedUndef))


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with whatever it raises as Unreadable: sympy raises many things on expressions that it cannot order
    or compare, and a reader that fails has no words for a tensor."""

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Unreadable:
            raise
        except Exception as error:
            raise Unreadable(f"{type(error).__name__}: {error}") from error

    return call


INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Dtypes of whole numbers, the widest last."""


def may_round(source: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether a cast from ``source`` to a floating-point ``dtype`` may round."""
    if source == torch.bool:
        return False
    return (
        not source.is_floating_point
        or torch.finfo(source).bits > torch.finfo(dtype).bits
        or (source != dtype and torch.finfo(source).bits == torch.finfo(dtype).bits)
    )


def is_one(size: Any) -> bool:
    """Whether a dimension broadcasts. A SymInt never does: Dynamo specialises 1."""
    return isinstance(size, int) and size == 1


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are the same expression."""
    return bool(symbolic.expand(as_expr(a) - as_expr(b)) == 0)


def broadcast_index(index: tuple[Any, ...], shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """Index of a tensor of ``shape`` inside a broadcast result: trailing dimensions align, size 1 is read at 0."""
    tail = index[len(index) - len(shape) :]
    return tuple(sympy.Integer(0) if is_one(size) else i for i, size in zip(tail, shape, strict=True))
