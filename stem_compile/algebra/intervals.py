"""Interval arithmetic on Python numbers or on tensors that hold many intervals at once.

An interval is (low, high), both inclusive; of a condition (certainly true, possibly true). Real arithmetic is done in
float32 where the values are tensors, so the results of real operations are widened by ``SLACK``: an interval contains
the exact value and every value that rounding makes of it.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch

Interval = tuple[Any, Any]
"""(low, high), both inclusive; for a Boolean (must be true, may be true)."""

INFINITE = float("inf")
UNBOUNDED: Interval = (-INFINITE, INFINITE)
SLACK = 2.0**-20
"""Relative error allowed to one real operation: 16 units in the last place of float32."""


def as_tensor(value: Any, device: torch.device) -> torch.Tensor:
    """A tensor as it is, a number as one on ``device``: filled there, since a copy would wait for the device."""
    return value if isinstance(value, torch.Tensor) else torch.full((), value, device=device)


def minimum(a: Any, b: Any) -> Any:
    """The smaller of two numbers or, elementwise, tensors."""
    return _extreme(a, b, min, torch.minimum)


def maximum(a: Any, b: Any) -> Any:
    """The larger of two numbers or, elementwise, tensors."""
    return _extreme(a, b, max, torch.maximum)


def _extreme(a: Any, b: Any, pick: Any, elementwise: Any) -> Any:
    if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
        return pick(a, b)
    device = a.device if isinstance(a, torch.Tensor) else b.device
    return elementwise(as_tensor(a, device), as_tensor(b, device))


def negated(truth: Any) -> Any:
    """Not, of a bool or a bool tensor."""
    return ~truth if isinstance(truth, torch.Tensor) else not truth


def is_infinite(x: Any) -> bool:
    """Whether a bound is the number infinity (tensors are not asked)."""
    return isinstance(x, float) and math.isinf(x)


def is_real(x: Any) -> bool:
    """Whether a finite bound is a floating-point number or tensor."""
    return x.is_floating_point() if isinstance(x, torch.Tensor) else isinstance(x, float) and math.isfinite(x)


def widened(interval: Interval, magnitude: Any = None) -> Interval:
    """A real interval with room for rounding: ``SLACK`` of ``magnitude``, or of its own ends. Whole numbers stay."""
    low, high = interval
    if not (is_real(low) or is_real(high)):
        return interval
    room = SLACK * (maximum(abs(low), abs(high)) if magnitude is None else magnitude)
    return _moved(low, -room, -INFINITE), _moved(high, room, INFINITE)


def _moved(end: Any, room: Any, unbounded: float) -> Any:
    if isinstance(end, torch.Tensor) or isinstance(room, torch.Tensor):
        return (end + room).nan_to_num(nan=unbounded, posinf=INFINITE, neginf=-INFINITE)
    moved = end + room
    return unbounded if moved != moved else moved


def add(*terms: Interval) -> Interval:
    """Sum of intervals."""
    low = functools.reduce(operator.add, (t[0] for t in terms))
    high = functools.reduce(operator.add, (t[1] for t in terms))
    if not (is_real(low) or is_real(high)):
        return low, high
    return widened((low, high), functools.reduce(operator.add, (maximum(abs(a), abs(b)) for a, b in terms)))


def subtract(a: Interval, b: Interval) -> Interval:
    """Difference of intervals."""
    return add(a, (-b[1], -b[0]))


def multiply(*factors: Interval) -> Interval:
    """Product of intervals."""
    return functools.reduce(_times, factors)


def _times(a: Interval, b: Interval) -> Interval:
    corners = [_product(x, y) for x in a for y in b]
    return widened((functools.reduce(minimum, corners), functools.reduce(maximum, corners)))


def _product(x: Any, y: Any) -> Any:
    # 0 * infinity is 0 here: the zero is exact.
    if isinstance(x, torch.Tensor) or isinstance(y, torch.Tensor):
        unbounded = is_infinite(x) or is_infinite(y) or is_real(x) or is_real(y)
        return (x * y).nan_to_num(nan=0.0, posinf=INFINITE, neginf=-INFINITE) if unbounded else x * y
    return 0 if 0 in (x, y) else x * y


def monotone(function: Callable[[Any], Any]) -> Callable[[Interval], Interval]:
    """Interval function of a nondecreasing real function."""
    return lambda interval: widened((function(interval[0]), function(interval[1])))


def floor_divide(a: Interval, b: Interval) -> Interval:
    """Of whole numbers, where the divisor is a known range of positive numbers; else unbounded."""
    (low, high), (least, most) = a, b
    if isinstance(least, torch.Tensor) or isinstance(most, torch.Tensor) or least <= 0 or is_infinite(most):
        return UNBOUNDED
    return (
        low if is_infinite(low) else minimum(low // least, low // most),
        high if is_infinite(high) else maximum(high // least, high // most),
    )


def modulo(a: Interval, b: Interval) -> Interval:
    """Of whole numbers, where the divisor is a known range of positive numbers; else unbounded."""
    least, most = b
    if isinstance(least, torch.Tensor) or isinstance(most, torch.Tensor) or least <= 0:
        return UNBOUNDED
    return 0, most if is_real(most) or is_infinite(most) else most - 1


def power(base: Interval, exponent: Interval) -> Interval:
    """Of a real number to the power of a constant."""
    (low, high), n = base, exponent[0]
    if n > 0 and float(n).is_integer():
        ends = _power(low, int(n)), _power(high, int(n))
        least = minimum(*ends)
        if int(n) % 2 == 0:
            least = minimum(least, _zero_within(low, high))
        return widened((least, maximum(*ends)))
    if isinstance(low, torch.Tensor) or isinstance(high, torch.Tensor) or low < 0 or (n < 0 and low == 0):
        return UNBOUNDED
    ends = _power(float(low), n), _power(float(high), n)
    return widened((minimum(*ends), maximum(*ends)))


def _zero_within(low: Any, high: Any) -> Any:
    """0 where an interval holds it, infinity elsewhere."""
    within = (low <= 0) & (high >= 0)
    return torch.where(within, 0.0, INFINITE) if isinstance(within, torch.Tensor) else 0 if within else INFINITE


def _power(x: Any, n: Any) -> Any:
    try:
        return x**n
    except OverflowError:
        return INFINITE if x > 0 or n % 2 == 0 else -INFINITE


def absolute(a: Interval) -> Interval:
    """Of |a|."""
    low, high = a
    return maximum(0, maximum(low, -high)), maximum(high, -low)


def choose(condition: Interval, a: Interval, b: Interval) -> Interval:
    """Of ``a if condition else b``."""
    certain, possible = condition
    if not isinstance(certain, torch.Tensor) and not isinstance(possible, torch.Tensor):
        return a if certain else b if not possible else (minimum(a[0], b[0]), maximum(a[1], b[1]))
    return minimum(a[0], b[0]), maximum(a[1], b[1])


def folded(function: Callable[[Any, Any], Any]) -> Callable[..., Interval]:
    """Of an operation that is nondecreasing in all arguments, such as min, max, and, or."""
    return lambda *parts: (
        functools.reduce(function, (p[0] for p in parts)),
        functools.reduce(function, (p[1] for p in parts)),
    )


def invert(a: Interval) -> Interval:
    """Of not a."""
    return negated(a[1]), negated(a[0])


def exclusive(*parts: Interval) -> Interval:
    """Of xor: certain only where every part is."""
    return functools.reduce(_exclusive, parts)


def _exclusive(a: Interval, b: Interval) -> Interval:
    certain = (a[0] & negated(b[1])) | (negated(a[1]) & b[0])
    return certain, (a[1] & negated(b[0])) | (negated(a[0]) & b[1])


def less_equal(a: Interval, b: Interval) -> Interval:
    """Of a <= b."""
    return a[1] <= b[0], a[0] <= b[1]


def less(a: Interval, b: Interval) -> Interval:
    """Of a < b."""
    return a[1] < b[0], a[0] < b[1]


def equal(a: Interval, b: Interval) -> Interval:
    """Of a == b."""
    same = (a[0] == b[1]) & (a[1] == b[0])
    return same, (a[0] <= b[1]) & (a[1] >= b[0])
