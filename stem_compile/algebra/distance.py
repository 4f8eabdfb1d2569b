"""Position biases as functions of the distance between key and query, so that large positions cancel before they are
multiplied.

Reading multiplies sums out: ``slope*(kv - q)`` becomes ``slope*kv - slope*q``, the same number in exact arithmetic. In
float32 each product is rounded at the size of the position, and for near keys of a long prompt the rounding is all
that is left of the difference. ``by_distance`` writes such expressions in ``distance(kv, q)``, a difference of whole
numbers that nothing multiplies out.
"""

from __future__ import annotations

import functools
from typing import Any

import sympy

from stem_compile.algebra import functions
from stem_compile.algebra.functions import Distance, expand
from stem_compile.algebra.symbols import KV, SCORE, Q, load_index


@functools.lru_cache(maxsize=1024)
def by_distance(expr: Any) -> Any:
    """The expression with every sum that depends on ``KV`` and ``Q`` by their difference alone written in
    ``Distance(KV, Q + shift)``; others stay. Conditions and indices of loads, which are exact, are left alone."""
    if isinstance(expr, sympy.logic.boolalg.Boolean) or not expr.args or load_index(expr) is not None:
        return expr
    row = functions.row_of(expr)
    if row is not None and row.gives is functions.INTEGER:
        return expr
    expr = expr.func(*(by_distance(a) for a in expr.args))
    return _sum_by_distance(expr) if isinstance(expr, sympy.Add) else expr


def _sum_by_distance(total: Any) -> Any:
    """A sum, as a polynomial in the distance where it is one."""
    opaque: dict[Any, Any] = {f: sympy.Dummy(real=True) for f in _outermost(total)}
    back = {dummy: f for f, dummy in opaque.items()}
    polynomial = total.xreplace(opaque)
    apart = [t for t in sympy.Add.make_args(polynomial) if not t.has(KV, Q)]
    moving = sympy.Add(*(t for t in sympy.Add.make_args(polynomial) if t.has(KV, Q)))
    gap = sympy.Dummy("gap", integer=True)
    if not moving.has(KV) or not moving.has(Q) or not moving.is_polynomial(KV, Q):
        return total
    # What does not move may hold the shift: slope*(kv - q - shift).
    for constants in ([a for a in apart if not a.has(SCORE)], []):
        inside = expand((moving + sympy.Add(*constants)).subs(KV, Q + gap))
        if inside.has(Q):
            return total
        shift, inside = _shifted(inside, gap)
        if constants and shift == 0:
            continue
        outside = sympy.Add(*(a for a in apart if a not in constants))
        powers = sympy.collect(inside, gap, evaluate=False)
        distance = {gap: Distance(KV, Q + shift)}
        written = sympy.Add(*(factor * power.xreplace(distance) for power, factor in powers.items()))
        return (written + outside).xreplace(back)
    return total


def _shifted(inside: Any, gap: Any) -> tuple[Any, Any]:
    """(shift, the polynomial in ``gap - shift``) with fewer terms, where a whole number does that; else 0."""
    coefficients = sympy.Poly(inside, gap).all_coeffs()
    shift = sympy.cancel(-coefficients[1] / (coefficients[0] * (len(coefficients) - 1)))
    if shift == 0 or not shift.is_integer:
        return sympy.Integer(0), inside
    moved = expand(inside.subs(gap, gap + shift))
    fewer = len(sympy.Add.make_args(moved)) < len(sympy.Add.make_args(inside))
    return (shift, moved) if fewer else (sympy.Integer(0), inside)


def _outermost(expr: Any) -> list[Any]:
    """Functions of a sum that are no polynomial arithmetic, outermost first."""
    whole_power = isinstance(expr, sympy.Pow) and expr.exp.is_Integer and expr.exp > 0
    if isinstance(expr, sympy.Add | sympy.Mul) or whole_power:
        return [f for a in expr.args for f in _outermost(a)]
    return [expr] if expr.args else []
