"""Index arithmetic over sympy: the symbols every pass shares, exact evaluation, and bounds over a box.

A mask is a sympy Boolean in ``B, H, Q, KV`` (batch row, query head, query row, key position), in the lengths ``Q_LEN,
KV_LEN``, in runtime scalars ``S0, S1, ...`` and in loads ``T0(...), T1(...)`` from the tensors that the graph really
computes (a bool load is written
``Ne(T0(b, kv), 0)``; ``T0()`` is a tensor of no dimensions). A score is a real expression in the same symbols and
``SCORE``, the scaled product. Row budgets are integer expressions in ``ROW, BLOCKS``. The same expression is evaluated
on tensors (``evaluate``), bounded over a block (``bounds``) and printed as Triton (``kernels/triton/codegen.py``); all
three visit the same closed set of functions.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import BooleanFalse, BooleanTrue

B, H, Q, KV = sympy.symbols("b h q kv", integer=True, nonnegative=True)
Q_LEN, KV_LEN = sympy.symbols("q_len kv_len", integer=True, positive=True)
ROW, BLOCKS = sympy.symbols("row blocks", integer=True, nonnegative=True)
SCORE = sympy.Symbol("s", real=True)


class FloorDiv(sympy.Function):  # type: ignore[misc]
    """``floor(a / b)`` of integers with b > 0; prints as ``//`` in Python and Triton (where a >= 0 is the caller's
    duty)."""

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
    """``a if condition else b``. Unlike sympy.Piecewise it never rewrites what it holds, so a budget stays as it was
    written."""

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


LOADS = 16
"""Most tensors, and most scalars, of one attention."""


@functools.cache
def _names() -> dict[str, Any]:
    names: dict[str, Any] = {str(s): s for s in (B, H, Q, KV, Q_LEN, KV_LEN, SCORE)} | {
        "FloorDiv": FloorDiv,
        "Where": Where,
    }
    return names | {f"T{i}": tensor(i) for i in range(LOADS)} | {f"S{i}": scalar(i) for i in range(LOADS)}


def parse(text: str) -> Any:
    """Expression of ``str(expression)``. Raises what sympy raises for text that is none."""
    return sympy.sympify(text, locals=_names())


_BINARY: dict[Any, Any] = {
    sympy.Le: operator.le,
    sympy.Lt: operator.lt,
    sympy.Ge: operator.ge,
    sympy.Gt: operator.gt,
    sympy.Eq: operator.eq,
    sympy.Ne: operator.ne,
    FloorDiv: operator.floordiv,
    sympy.Mod: operator.mod,
}
REAL_FUNCTIONS: dict[Any, str] = {sympy.tanh: "tanh", sympy.exp: "exp", sympy.log: "log"}
"""Functions of one real argument that scores may hold: sympy's -> torch's and Triton's name."""


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
    if isinstance(expr, sympy.Pow) and expr.exp.is_number:
        return args[0] ** args[1]
    if expr.func in REAL_FUNCTIONS:
        name = REAL_FUNCTIONS[expr.func]
        return getattr(torch, name)(args[0]) if isinstance(args[0], torch.Tensor) else getattr(math, name)(args[0])
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
    raise TypeError(f"cannot evaluate {expr.func}; extend stem_compile/algebra/symbolic.py")


def _where(condition: Any, a: Any, b: Any) -> Any:
    if not isinstance(condition, torch.Tensor):
        return a if condition else b
    return torch.where(condition, as_tensor(a, condition.device), as_tensor(b, condition.device))


def as_tensor(value: Any, device: torch.device) -> torch.Tensor:
    """A tensor as it is, a number as one on ``device``: filled there, since a copy would wait for the device."""
    return value if isinstance(value, torch.Tensor) else torch.full((), value, device=device)


NARROW = (torch.uint8, torch.int8, torch.int16)


def widened(x: torch.Tensor) -> torch.Tensor:
    """What is loaded, in a dtype that arithmetic on positions neither overflows nor rounds."""
    return x.to(torch.int32) if x.dtype in NARROW else x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _extreme(a: Any, b: Any, pick: Any, elementwise: Any) -> Any:
    if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
        return pick(a, b)
    device = a.device if isinstance(a, torch.Tensor) else b.device
    return elementwise(as_tensor(a, device), as_tensor(b, device))


def _minimum(a: Any, b: Any) -> Any:
    return _extreme(a, b, min, torch.minimum)


def _maximum(a: Any, b: Any) -> Any:
    return _extreme(a, b, max, torch.maximum)


Interval = tuple[Any, Any]
"""(low, high), both inclusive; for a Boolean (must be true, may be true)."""


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
    if isinstance(expr, bool | BooleanTrue | BooleanFalse):
        return bool(expr), bool(expr)
    if isinstance(expr, int) or expr.is_number:
        return _number(expr), _number(expr)
    if load_index(expr) is not None:
        if expr.func not in box:
            return -INFINITE, INFINITE
        low, high = box[expr.func](*(bounds(a, box) for a in expr.args))
        return low, high
    if isinstance(expr, sympy.And | sympy.Or):
        parts = [bounds(a, box) for a in expr.args]
        fold = operator.and_ if isinstance(expr, sympy.And) else operator.or_
        return functools.reduce(fold, (p[0] for p in parts)), functools.reduce(fold, (p[1] for p in parts))
    if isinstance(expr, sympy.Not):
        low, high = bounds(expr.args[0], box)
        return _negated(high), _negated(low)
    if expr.is_Relational:
        return _relation(expr, box)
    parts = [bounds(a, box) for a in expr.args]
    if isinstance(expr, sympy.Add):
        return functools.reduce(operator.add, (p[0] for p in parts)), functools.reduce(
            operator.add, (p[1] for p in parts)
        )
    if isinstance(expr, sympy.Mul):
        return functools.reduce(_times, parts)
    if isinstance(expr, FloorDiv):
        (low, high), (d0, d1) = parts
        if not isinstance(d0, torch.Tensor) and d0 == d1 and d0 > 0:
            return (low if _infinite(low) else low // d0), (high if _infinite(high) else high // d0)
    if (
        isinstance(expr, sympy.Mod)
        and not isinstance(parts[1][0], torch.Tensor)
        and parts[1][0] == parts[1][1]
        and parts[1][0] > 0
    ):
        return 0, parts[1][1] - 1
    if isinstance(expr, Where):
        (certain, possible), a, b = parts
        if not isinstance(certain, torch.Tensor) and not isinstance(possible, torch.Tensor):
            return a if certain else b if not possible else (_minimum(a[0], b[0]), _maximum(a[1], b[1]))
        return _minimum(a[0], b[0]), _maximum(a[1], b[1])
    if isinstance(expr, sympy.Abs):
        low, high = parts[0]
        return _maximum(0, _maximum(low, -high)), _maximum(high, -low)
    if isinstance(expr, sympy.Min | sympy.Max):
        pick = _minimum if isinstance(expr, sympy.Min) else _maximum
        return functools.reduce(pick, (p[0] for p in parts)), functools.reduce(pick, (p[1] for p in parts))
    return -INFINITE, INFINITE


INFINITE = float("inf")


def _number(expr: Any) -> int | float:
    return int(expr) if isinstance(expr, int) or expr.is_Integer else float(expr)


def _negated(truth: Any) -> Any:
    return ~truth if isinstance(truth, torch.Tensor) else not truth


def _times(a: Interval, b: Interval) -> Interval:
    corners = [_product(x, y) for x in a for y in b]
    return functools.reduce(_minimum, corners), functools.reduce(_maximum, corners)


def _product(x: Any, y: Any) -> Any:
    # 0 * infinity is 0 here: the zero is exact.
    if isinstance(x, torch.Tensor) or isinstance(y, torch.Tensor):
        return (x * y).nan_to_num(nan=0.0, posinf=INFINITE, neginf=-INFINITE) if _infinite(x) or _infinite(y) else x * y
    return 0 if 0 in (x, y) else x * y


def _infinite(x: Any) -> bool:
    return isinstance(x, float) and math.isinf(x)


def _relation(expr: Any, box: Mapping[Any, Any]) -> Interval:
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
    same, may = (low == 0) & (high == 0), (low <= 0) & (high >= 0)
    return (same, may) if isinstance(expr, sympy.Eq) else (_negated(may), _negated(same))
