"""Sizes as expressions of the algebra: what Dynamo's SymInts and SymFloats say in torch's own sympy functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch

from stem_compile.algebra.symbolic import FloorDiv
from stem_compile.passes.reading.unreadable import Unreadable


def size_expr(size: torch.SymInt | torch.SymFloat) -> Any:
    """Expression of a symbolic size or of a float computed from sizes.

    A SymInt that the algebra has no words for (``int(n * 0.25)``) is one symbol, the value of the graph's own node. A
    SymFloat of that kind, and one that comes from outside, is read as the number it has now, which guards on it.
    """
    expr = size.node.expr
    try:
        translated = _translated(expr)
    except Unreadable:
        translated = None
    if isinstance(size, torch.SymInt):
        return translated if translated is not None else sympy.Symbol(f"size({expr})", integer=True)
    if translated is not None and translated.free_symbols and all(s.is_integer for s in translated.free_symbols):
        return translated
    return sympy.Rational(float(size))


def _translated(expr: Any) -> Any:
    if expr.is_Symbol or expr.is_Integer or expr.is_Rational:
        return expr
    if expr.is_Float:
        return sympy.Rational(float(expr))
    arguments = [_translated(a) for a in expr.args]
    if isinstance(expr, sympy.Add | sympy.Mul | sympy.Pow):
        return expr.func(*arguments)
    write = _WORDS.get(type(expr).__name__)
    if write is None:
        raise Unreadable(f"{type(expr).__name__} of sizes")
    return write(*arguments)


def _floor_div(a: Any, b: Any) -> Any:
    if b.is_positive is not True:
        raise Unreadable("a size divided by something that may not be positive")
    return FloorDiv(a, b)


def _shifted(a: Any, b: Any, left: bool) -> Any:
    if not (b.is_Integer and b >= 0):
        raise Unreadable("a size shifted by another")
    return a * 2**b if left else _floor_div(a, sympy.Integer(2) ** b)


def _mod(a: Any, b: Any) -> Any:
    if b.is_positive is not True:
        raise Unreadable("a size modulo something that may not be positive")
    return sympy.Mod(a, b)


_WORDS: dict[str, Callable[..., Any]] = {
    "FloorDiv": _floor_div,
    "CleanDiv": _floor_div,
    "Mod": _mod,
    "PythonMod": _mod,
    "ModularIndexing": lambda a, b, c: _mod(_floor_div(a, b), c),
    "LShift": lambda a, b: _shifted(a, b, left=True),
    "RShift": lambda a, b: _shifted(a, b, left=False),
    "PowByNatural": lambda a, b: a**b,
    "FloatPow": lambda a, b: a**b,
    "Max": lambda *a: sympy.Max(*a),
    "Min": lambda *a: sympy.Min(*a),
    "ToFloat": lambda a: a,
    "Identity": lambda a: a,
    "IntTrueDiv": lambda a, b: a / b,
    "FloatTrueDiv": lambda a, b: a / b,
    "OpaqueUnaryFn_sqrt": lambda a: a ** sympy.Rational(1, 2),
    "OpaqueUnaryFn_exp": sympy.exp,
    "OpaqueUnaryFn_log": sympy.log,
}
"""torch's functions of sizes, by the name of their class, in the algebra's words."""
