"""Index arithmetic over sympy: exact evaluation, and bounds over a box.

A mask is a sympy Boolean in the symbols of ``symbols.py`` (a bool load is written ``Ne(T0(b, kv), 0)``; ``T0()`` is a
tensor of no dimensions). A score is a real expression in the same symbols and ``SCORE``. Row budgets are integer
expressions in ``ROW, BLOCKS``. The same expression is evaluated on tensors (``evaluate``), bounded over a block
(``bounds``), written as text (``text.py``) and printed as Triton (``kernels/triton/codegen.py``); all of them know the
functions of one table (``functions.py``) and no other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanFalse, BooleanTrue

from stem_compile.algebra import functions, intervals
from stem_compile.algebra.functions import FloorDiv, Where, expand
from stem_compile.algebra.intervals import INFINITE, UNBOUNDED, Interval, as_tensor
from stem_compile.algebra.symbols import (
    BLOCKS,
    KV,
    KV_LEN,
    LOADS,
    Q_LEN,
    ROW,
    SCORE,
    B,
    H,
    Q,
    load_index,
    scalar,
    tensor,
)
from stem_compile.algebra.text import OutsideAlgebra, check
from stem_compile.algebra.text import decode as parse

__all__ = [
    "BLOCKS",
    "INFINITE",
    "KV",
    "KV_LEN",
    "LOADS",
    "NARROW",
    "Q_LEN",
    "ROW",
    "SCORE",
    "B",
    "FloorDiv",
    "H",
    "Interval",
    "OutsideAlgebra",
    "Q",
    "Where",
    "as_tensor",
    "bounds",
    "check",
    "evaluate",
    "expand",
    "load_index",
    "loads",
    "parse",
    "scalar",
    "tensor",
    "widened",
]

NARROW = (torch.uint8, torch.int8, torch.int16)


def widened(x: torch.Tensor) -> torch.Tensor:
    """What is loaded, in a dtype that arithmetic on positions neither overflows nor rounds."""
    if x.dtype == torch.bool or x.dtype.is_complex or x.dtype in (torch.float32, torch.float64):
        return x
    return x.float() if x.dtype.is_floating_point else x.long()


def evaluate(expr: Any, env: Mapping[Any, Any]) -> Any:
    """Value of ``expr`` on Python numbers or broadcastable integer, floating-point or bool tensors.

    ``env`` maps symbols to values, and load functions (``tensor(i)``) to callables of the index values.
    Raises KeyError for a symbol that ``env`` does not bind, OutsideAlgebra (a TypeError) for a function that is not in
    the table.
    """
    if expr in env:
        return env[expr]
    if isinstance(expr, bool | int | float):
        return expr
    if isinstance(expr, BooleanTrue | BooleanFalse):
        return bool(expr)
    if expr.is_Symbol:
        raise KeyError(f"{expr} has no value; bound are {sorted(map(str, env))}")
    if expr.is_number and not expr.args:
        return _number(expr)
    args = [evaluate(a, env) for a in expr.args]
    if load_index(expr) is not None:
        return env[expr.func](*args)
    row = functions.row_of(expr)
    if row is None:
        check(expr)
        raise AssertionError(f"check passes {expr}")
    return row.evaluate(*args)


def bounds(expr: Any, box: Mapping[Any, Any]) -> Interval:
    """Interval that contains ``expr`` for every point of ``box`` (symbols -> inclusive (low, high)).

    For a Boolean the answer is (certainly, possibly): (True, True) holds everywhere, (False, False) nowhere, (False,
    True) is unknown. Low and high are numbers, or broadcastable tensors that bound many boxes at once. ``box`` may bind
    a load function (``tensor(i)``) to a callable of its indices' intervals; other loads are unbounded. Sound, not
    tight: a symbol used twice is bounded twice.
    """
    if expr in box:
        low, high = box[expr]
        return low, high
    if isinstance(expr, bool | int | float):
        return expr, expr
    if isinstance(expr, BooleanTrue | BooleanFalse):
        return bool(expr), bool(expr)
    if expr.is_number and not expr.args:
        return _constant(_number(expr))
    if load_index(expr) is not None:
        if expr.func not in box:
            return UNBOUNDED
        low, high = box[expr.func](*(bounds(a, box) for a in expr.args))
        return low, high
    row = functions.row_of(expr)
    if row is None:
        return UNBOUNDED
    if isinstance(expr, Relational) and (difference := _difference(expr)) is not None:
        # kv - q and an offset are bounded more tightly together than the two sides apart.
        return row.bounds(bounds(difference, box), (0, 0))
    return row.bounds(*(bounds(a, box) for a in expr.args))


def _difference(relation: Any) -> Any:
    """Left side minus right side of a comparison of whole numbers; None where floating point may round, which makes of
    two sides that differ two that do not."""
    if any(not n.is_Integer for n in relation.atoms(sympy.Number)):
        return None
    rows = [functions.row_of(part) for part in sympy.preorder_traversal(relation)]
    if any(row is not None and row.gives is functions.REAL for row in rows):
        return None
    difference = expand(relation.lhs - relation.rhs)
    # A load may be of floating-point numbers: it must not cancel.
    return difference if loads(difference) == loads(relation) else None


def loads(expr: Any) -> set[Any]:
    """The loads that an expression makes, each with its indices: ``T0(b, kv)``."""
    return {f for f in expr.atoms(AppliedUndef) if load_index(f) is not None}


def _constant(value: int | float) -> Interval:
    """A constant, with room for its rounding to float32 where that changes it."""
    exact = isinstance(value, int) or not math.isfinite(value) or value == torch.tensor(value).item()
    return (value, value) if exact else intervals.widened((value, value))


def _number(expr: Any) -> int | float:
    return int(expr) if expr.is_Integer else float(expr)
