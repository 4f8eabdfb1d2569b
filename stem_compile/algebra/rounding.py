"""What a dtype makes of a number, as functions of the algebra: ``fp32(x)``, ``bf16(x)``, ``fp16(x)``, ``i32(x)``.

Expressions are exact; a graph's arithmetic is not. ``fp32(fp32(q*0.02) - fp32(kv*0.02))`` is what float32 makes of that
difference: around every operation one rounding, to nearest, ties to even. A function of this file around one
operation on numbers that the dtype holds is exactly that operation in the dtype, on every device: sums, differences,
products, quotients and roots of float32 numbers, computed in float32 or double and rounded once, are the correctly
rounded ones, and so are those of half-precision numbers computed in float32.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import sympy
import torch

from stem_compile.algebra.intervals import Interval


class Rounded(sympy.Function):  # type: ignore[misc]
    """A real number as the nearest one that ``dtype`` holds."""

    nargs = (1,)
    dtype: ClassVar[torch.dtype]

    @classmethod
    def eval(cls, x: Any) -> Any:
        if isinstance(x, Rounded) and _within(x.dtype, cls.dtype):
            return x
        if x.is_Rational or x.is_Float:
            value = nearest(float(x), cls.dtype)
            exact = math.isfinite(value) and sympy.Rational(value) == sympy.Rational(x)
            return x if exact else sympy.Float(value)
        return None

    def _eval_is_extended_real(self) -> bool:
        return True


class BFloat16(Rounded):
    dtype = torch.bfloat16


class Float16(Rounded):
    dtype = torch.float16


class Float32(Rounded):
    dtype = torch.float32


class Int32(sympy.Function):  # type: ignore[misc]
    """A whole number as int32 holds it: 2^31 comes round to -2^31."""

    nargs = (1,)

    @classmethod
    def eval(cls, x: Any) -> Any:
        return sympy.Integer(wrapped(int(x))) if x.is_Integer else x if isinstance(x, Int32) else None

    def _eval_is_integer(self) -> bool:
        return True


FUNCTIONS: dict[torch.dtype, type[sympy.Function]] = {
    torch.bfloat16: BFloat16,
    torch.float16: Float16,
    torch.float32: Float32,
    torch.int32: Int32,
}
"""Dtypes that have a function here."""


def _within(inner: torch.dtype, outer: torch.dtype) -> bool:
    """Whether ``outer`` holds every number of ``inner``."""
    return inner == outer or outer == torch.float32


def nearest(x: float, dtype: torch.dtype) -> float:
    """A Python number as a dtype holds it."""
    return float(torch.tensor(x, dtype=torch.float64).to(dtype).item())


def rounded(x: Any, dtype: torch.dtype) -> Any:
    """A number, or a tensor of numbers, as a floating-point dtype holds them; tensors stay float32 or float64."""
    if not isinstance(x, torch.Tensor):
        return nearest(float(x), dtype)
    wide = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float64)
    result = wide.to(dtype)
    return result.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def wrapped(x: Any) -> Any:
    """A whole number, or an int64 tensor of them, as int32 holds them."""
    if isinstance(x, torch.Tensor):
        return x.to(torch.int64).to(torch.int32).to(torch.int64)
    return (int(x) + (1 << 31)) % (1 << 32) - (1 << 31)


def bound(interval: Interval, dtype: torch.dtype) -> Interval:
    """Interval of rounded numbers: rounding keeps their order."""
    return rounded(interval[0], dtype), rounded(interval[1], dtype)


def bound_wrapped(interval: Interval) -> Interval:
    """Interval of wrapped numbers."""
    low, high = interval
    limits = -(1 << 31), (1 << 31) - 1
    if isinstance(low, torch.Tensor) or isinstance(high, torch.Tensor):
        fits = torch.as_tensor((low >= limits[0]) & (high <= limits[1]))
        return torch.where(fits, low, limits[0]), torch.where(fits, high, limits[1])
    return interval if low >= limits[0] and high <= limits[1] else limits
