"""Index arithmetic over sympy: the symbols every pass shares, exact evaluation, and bounds over a box.

A mask is a sympy Boolean in ``B, H, Q, KV`` (batch row, query head, query row, key position), in the lengths ``Q_LEN, KV_LEN``,
in runtime scalars ``S0, S1, ...`` and in loads ``T0(...), T1(...)`` from the tensors that the graph really computes (a bool load is written
``Ne(T0(b, kv), 0)``).
Row budgets are integer expressions in ``ROW, BLOCKS``. The same expression is evaluated on tensors (``evaluate``), bounded over a
block (``bounds``) and printed as Triton (``kernels/codegen.py``); all three visit the same closed set of functions.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import BooleanFalse, BooleanTrue

B, H, Q, KV = sympy.symbols("b h q kv", integer=True, nonnegative=True)
Q_LEN, KV_LEN = sympy.symbols("q_len kv_len", integer=True, positive=True)
ROW, BLOCKS = sympy.symbols("row blocks", integer=True, nonnegative=True)


class FloorDiv(sympy.Function):  # type: ignore[misc]
    """``floor(a / b)`` of integers with b > 0; prints as ``//`` in Python and Triton (where a >= 0 is the caller's duty)."""

    nargs = (2,)

    @classmethod
    def eval(cls, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
        if a.is_Integer and b.is_Integer:
            return sympy.Integer(int(a) // int(b))
        if b == 1:
            return a
        quotient = sympy.expand(a / b) if b.is_Integer else a / b
        # (2 q) // 2 is q: every coefficient divides.
        if b.is_Integer and all(c.is_Integer for c in quotient.as_coefficients_dict().values()):
            return quotient
        return None

    def _eval_is_integer(self) -> bool:
        return True

    def _eval_is_nonnegative(self) -> bool | None:
        a, b = self.args
        return True if a.is_nonnegative and b.is_positive else None


class Where(sympy.Function):  # type: ignore[misc]
    """``a if condition else b``. Unlike sympy.Piecewise it never rewrites what it holds, so a budget stays as it was written."""

    nargs = (3,)

    @classmethod
    def eval(cls, condition: Any, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
        if condition in (sympy.true, sympy.false):
            return a if condition == sympy.true else b
        return None

    def _eval_is_integer(self) -> bool | None:
        return True if self.args[1].is_integer and self.args[2].is_integer else None


@functools.cache
def tensor(index: int) -> Any:
    """The load function of the site's mask tensor number ``index``: ``T0(b, kv)``."""
    return sympy.Function(f"T{index}")


@functools.cache
def scalar(index: int) -> sympy.Symbol:
    """The site's runtime scalar number ``index`` (an int known only when the graph runs)."""
    return sympy.Symbol(f"S{index}", integer=True)


def load_index(expr: sympy.Basic) -> int | None:
    """Number of the mask tensor that ``expr`` loads from, or None when it is not a load."""
    name = getattr(getattr(expr, "func", None), "__name__", "")
    return int(name[1:]) if name[:1] == "T" and name[1:].isdigit() else None


_BINARY: dict[Any, Any] = {
    sympy.Le: operator.le, sympy.Lt: operator.lt, sympy.Ge: operator.ge, sympy.Gt: operator.gt,
    sympy.Eq: operator.eq, sympy.Ne: operator.ne, FloorDiv: operator.floordiv, sympy.Mod: operator.mod,
}  # fmt: skip


def evaluate(expr: Any, env: Mapping[Any, Any]) -> Any:
    """Value of ``expr`` on Python ints or broadcastable integer/bool tensors.

    ``env`` maps symbols to values, and load functions (``tensor(i)``) to callables of the index values.
    Raises KeyError for a symbol that ``env`` does not bind, TypeError for a function outside the closed set.
    """
    if expr in env:
        return env[expr]
    if isinstance(expr, bool | int | BooleanTrue | BooleanFalse | sympy.Integer):
        return bool(expr) if isinstance(expr, bool | BooleanTrue | BooleanFalse) else int(expr)
    if expr.is_Symbol:
        raise KeyError(f"{expr} has no value; bound are {sorted(map(str, env))}")
    if expr.is_Float or expr.is_Rational:
        return float(expr)
    args = [evaluate(a, env) for a in expr.args]
    if expr.func in _BINARY:
        return _BINARY[expr.func](*args)
    if isinstance(expr, sympy.Add):
        return functools.reduce(operator.add, args)
    if isinstance(expr, sympy.Mul):
        return functools.reduce(operator.mul, args)
    if isinstance(expr, sympy.Pow) and expr.exp.is_Integer and expr.exp > 0:
        return args[0] ** args[1]
    if isinstance(expr, sympy.And):
        return functools.reduce(operator.and_, args)
    if isinstance(expr, sympy.Or):
        return functools.reduce(operator.or_, args)
    if isinstance(expr, sympy.Not):
        return ~args[0] if isinstance(args[0], torch.Tensor) else not args[0]
    if isinstance(expr, sympy.Min | sympy.Max):
        return functools.reduce(_minimum if isinstance(expr, sympy.Min) else _maximum, args)
    if isinstance(expr, Where):
        return _where(*args)
    if isinstance(expr, sympy.Abs):
        return abs(args[0])
    if load_index(expr) is not None:
        return env[expr.func](*args)
    raise TypeError(f"cannot evaluate {expr.func}; extend stem_compile/symbolic.py")


def _where(condition: Any, a: Any, b: Any) -> Any:
    if not isinstance(condition, torch.Tensor):
        return a if condition else b
    return torch.where(condition, torch.as_tensor(a, device=condition.device), torch.as_tensor(b, device=condition.device))


def _extreme(a: Any, b: Any, pick: Any, elementwise: Any) -> Any:
    if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
        return pick(a, b)
    device = a.device if isinstance(a, torch.Tensor) else b.device
    return elementwise(torch.as_tensor(a, device=device), torch.as_tensor(b, device=device))


def _minimum(a: Any, b: Any) -> Any:
    return _extreme(a, b, min, torch.minimum)


def _maximum(a: Any, b: Any) -> Any:
    return _extreme(a, b, max, torch.maximum)


Interval = tuple[Any, Any]
"""(low, high), both inclusive; for a Boolean (must be true, may be true)."""


def bounds(expr: Any, box: Mapping[Any, Interval]) -> Interval:
    """Interval that contains ``expr`` for every point of ``box`` (symbols -> inclusive (low, high)).

    For a Boolean the answer is (certainly, possibly): (True, True) holds everywhere, (False, False) nowhere, (False, True) is unknown.
    Loads from tensors are unknown Booleans; an integer load is unbounded. Sound, not tight: a symbol used twice is bounded twice.
    """
    inf = float("inf")
    if expr in box:
        return box[expr]
    if isinstance(expr, bool | BooleanTrue | BooleanFalse):
        return bool(expr), bool(expr)
    if isinstance(expr, int) or expr.is_number:
        return int(expr), int(expr)
    if load_index(expr) is not None:
        return -inf, inf
    if isinstance(expr, sympy.And | sympy.Or):
        parts = [bounds(a, box) for a in expr.args]
        fold = all if isinstance(expr, sympy.And) else any
        return fold(p[0] for p in parts), fold(p[1] for p in parts)
    if isinstance(expr, sympy.Not):
        low, high = bounds(expr.args[0], box)
        return not high, not low
    if expr.is_Relational:
        return _relation(expr, box)
    parts = [bounds(a, box) for a in expr.args]
    if isinstance(expr, sympy.Add):
        return sum(p[0] for p in parts), sum(p[1] for p in parts)
    if isinstance(expr, sympy.Mul):
        return functools.reduce(_times, parts)
    if isinstance(expr, FloorDiv):
        (low, high), (d0, d1) = parts
        if d0 == d1 and d0 > 0:
            return (low // d0 if low != -inf else low), (high // d0 if high != inf else high)
    if isinstance(expr, sympy.Mod) and parts[1][0] == parts[1][1] and parts[1][0] > 0:
        return 0, parts[1][1] - 1
    if isinstance(expr, Where):
        condition, a, b = parts
        return a if condition == (True, True) else b if condition == (False, False) else (min(a[0], b[0]), max(a[1], b[1]))
    if isinstance(expr, sympy.Min | sympy.Max):
        pick = min if isinstance(expr, sympy.Min) else max
        return pick(p[0] for p in parts), pick(p[1] for p in parts)
    return -inf, inf


def _times(a: Interval, b: Interval) -> Interval:
    corners = [0 if 0 in (x, y) else x * y for x in a for y in b]
    return min(corners), max(corners)


def _relation(expr: Any, box: Mapping[Any, Interval]) -> Interval:
    # Bound the difference: kv - q - offset is tighter than the two sides apart.
    low, high = bounds(sympy.expand(expr.lhs - expr.rhs), box)
    if isinstance(expr, sympy.Le):
        return high <= 0, low <= 0
    if isinstance(expr, sympy.Lt):
        return high < 0, low < 0
    if isinstance(expr, sympy.Ge):
        return low >= 0, high >= 0
    if isinstance(expr, sympy.Gt):
        return low > 0, high > 0
    same, may = low == high == 0, low <= 0 <= high
    return (same, may) if isinstance(expr, sympy.Eq) else (not may, not same)
