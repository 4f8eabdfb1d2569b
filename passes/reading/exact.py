"""Floating point is not the rationals: which symbolic values a dtype holds exactly, and what it rounds the others to.

Readers compute with exact numbers. Where the graph's own arithmetic rounds, a comparison may come out the other way
(``i * 0.02 - j * 0.02 <= 0.5``), so a comparison is read only where both of its sides are held exactly.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch

from stem_compile.algebra import symbolic
from stem_compile.algebra.symbolic import KV, B, H, Q, Where

LONGEST = 1 << 21
"""Tokens that a prompt of symbolic length is taken to stay below."""
HALF = (torch.float16, torch.bfloat16)
# fmt: off
KEEPS = frozenset({
    "ones", "zeros", "full", "empty", "new_ones", "new_zeros", "new_full", "ones_like", "zeros_like", "full_like",
    "fill", "zero", "tensor", "scalar_tensor", "tril", "triu", "where", "masked_fill", "neg", "abs", "max",
    "minimum", "maximum", "clamp", "relu", "hardtanh", "nan_to_num", "contiguous", "clone", "detach", "alias",
    "to", "type", "type_as", "bool", "long", "int", "float", "half", "double", "bfloat16", "dropout", "unsqueeze",
    "transpose", "t", "permute", "getitem", "select", "narrow", "flip", "expand", "expand_as", "repeat", "cat",
    "stack", "pad", "view", "reshape", "squeeze", "flatten", "unflatten", "view_as", "reshape_as", "le", "lt",
    "ge", "gt", "eq", "ne", "and", "or", "xor", "not",
})
# fmt: on
"""Operations whose results are values that they were given, or constants; all others may round. Casts are told by their
dtypes."""


def rounded(expr: Any, dtype: torch.dtype) -> Any:
    """The expression with its constants, and those that its choices are between, as ``dtype`` holds them."""
    if isinstance(expr, Where):
        return Where(expr.args[0], rounded(expr.args[1], dtype), rounded(expr.args[2], dtype))
    if isinstance(expr, sympy.Rational) and abs(expr) <= sympy.Rational(torch.finfo(dtype).max):
        return sympy.Rational(torch.tensor(float(expr), dtype=torch.float64).to(dtype).item())
    return expr


def holds(dtype: torch.dtype, expr: Any, bounds: tuple[Any, Any]) -> bool:
    """Whether every value of the expression, which lies in ``bounds``, is a number of a floating-point ``dtype``."""
    if isinstance(expr, Where):
        return holds(dtype, expr.args[1], bounds) and holds(dtype, expr.args[2], bounds)
    if expr.is_number:
        return bool(rounded(expr, dtype) == expr) if expr.is_Rational else abs(expr) >= sympy.Rational(LONGEST)
    steps = 1
    for term in sympy.Add.make_args(symbolic.expand(expr)):
        factor, rest = term.as_coeff_Mul()
        whole = rest == 1 or (rest.is_integer is True and _loads_nothing(rest))
        if not factor.is_Rational or not whole or int(factor.q).bit_count() != 1:
            return False
        steps = max(steps, int(factor.q))
    largest = max(abs(bound) for bound in bounds)
    return bool(largest * steps <= 2 / torch.finfo(dtype).eps)


def _loads_nothing(expr: Any) -> bool:
    return not any(symbolic.load_index(f) is not None for f in expr.atoms(sympy.core.function.AppliedUndef))


def counts(expr: Any) -> bool:
    """Whether positions enter a number themselves, not only in conditions or as places of loads."""
    inside = {e: sympy.Integer(0) for e in expr.atoms(Where) | expr.atoms(sympy.core.function.AppliedUndef)}
    ends = [end for e in expr.atoms(Where) for end in e.args[1:]]
    places = {s for s in expr.xreplace(inside).free_symbols if s in (B, H, Q, KV) or str(s).startswith("_")}
    return bool(places) or any(counts(end) for end in ends)


def mixes(expr: Any) -> bool:
    """Whether a number is more than one load, scaled and shifted by constants: then half precision rounds what no
    constant tells."""
    loads = [f for f in expr.atoms(sympy.core.function.AppliedUndef) if symbolic.load_index(f) is not None]
    return counts(expr) or len(loads) > 1
