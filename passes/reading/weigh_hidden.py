"""What eager attention makes of a row that sees no key: the mean of all values, where all its scores are hidden ones
and those are equal and finite; where some are finite and they differ, its keys are weighed by them.

A hidden score may hide twice as much where it is hidden twice (then it is -inf, or counts for nothing beside the
others), and one that is not very
negative keeps what it was: there a row that sees no key is no plain mean, and must be computed.
"""

from __future__ import annotations

import itertools
from typing import Any

import sympy
import torch

from stem_compile.algebra import symbolic
from stem_compile.algebra.symbolic import KV, Q
from stem_compile.passes.reading.expressions import HIDDEN
from stem_compile.passes.reading.split_logits import LARGE, Hide, RowMaximum, hidden_conditions, in_floats

LOST = 32.0
"""Units in the last place, relative to 1, from which adding a constant rounds ordinary scores away: half a unit is then
8 or more."""
FAR = 1e7
"""The same for scores that grow with positions."""
MOST = 4
"""Reasons to hide a key up to which their combinations are tried."""


def evenly_hidden(
    expr: Any, dtype: torch.dtype, dtypes: list[torch.dtype], row_maximum: RowMaximum = lambda load: None
) -> Any:
    """Predicate such that a row to which no key fulfils it has equal, finite scores; None where no such predicate is
    known.

    expr: logits in ``SCORE``. dtype: of the logits. dtypes: of the tensors T0, T1, ...
    """
    hides, visible_logits = hidden_conditions(expr, row_maximum)
    if len(hides) == 1 and hides[0].load is not None and visible_logits.as_coefficients_dict()[hides[0].load] > 0:
        return _lowest_entries(hides[0].load, visible_logits, dtype, dtypes)
    if not 0 < len(hides) <= MOST or any(h.load is not None for h in hides):
        return None
    levels = _levels(expr, hides, dtype)
    even = len(levels) == 1 and None not in levels and -torch.inf not in levels
    return in_floats(sympy.And(*(h.visible for h in hides))) if even else None


def weighed_hidden(expr: Any, dtype: torch.dtype, row_maximum: RowMaximum = lambda load: None) -> bool:
    """Whether a row that sees no key may have finite scores: False only where all that hides is known to give -inf. For
    logits of which ``evenly_hidden`` says None."""
    hides, _ = hidden_conditions(expr, row_maximum)
    if any(h.load is not None for h in hides) or len(hides) > MOST:
        return True
    return bool(_levels(expr, hides, dtype) - {-torch.inf})


def _levels(expr: Any, hides: list[Hide], dtype: torch.dtype) -> set[float | None]:
    """Levels of a key that some of the hides hide, whichever."""
    return {
        _level(expr.xreplace(_replacements(hides, hidden)), dtype)
        for hidden in itertools.product((False, True), repeat=len(hides))
        if any(hidden)
    }


def _replacements(hides: list[Hide], hidden: tuple[bool, ...]) -> dict[Any, Any]:
    """Replacements in the logits of a key that some of the hides hide and the others do not."""
    table: dict[Any, Any] = {}
    for hide, is_hidden in zip(hides, hidden, strict=True):
        table |= hide.hidden_logits if is_hidden else hide.visible_logits
    return table


def _lowest_entries(load: Any, logits: Any, dtype: torch.dtype, dtypes: list[torch.dtype]) -> Any:
    """The same for a bias that was not understood and holds the mask: its entries must be the lowest of its dtype."""
    stored = dtypes[symbolic.load_index(load) or 0]
    if not stored.is_floating_point:
        return None
    lowest = sympy.Rational(torch.finfo(stored).min)
    level = _level(logits.xreplace({load: lowest}), dtype)
    return None if level in (None, -torch.inf) else in_floats(sympy.Ne(load, lowest))


def _level(expr: Any, dtype: torch.dtype) -> float | None:
    """The number that an expression of a score is rounded to in ``dtype``, whatever the score; None where the score
    stays."""
    clamps = {e: level for e in expr.atoms(sympy.Max, sympy.Min) if (level := _extreme(e, dtype)) is not None}
    constant, rest = symbolic.expand(expr.xreplace(clamps)).as_coeff_Add()
    if rest != 0:
        # Loads are of ordinary size, as everywhere (``split_logits.is_deep``).
        ordinary = all(abs(n) < LARGE for n in rest.atoms(sympy.Number))
        if not ordinary or abs(constant) * torch.finfo(dtype).eps < (FAR if rest.has(Q, KV) else LOST):
            return None
    return torch.tensor(float(constant), dtype=torch.float64).to(dtype).item()


def _extreme(clamp: Any, dtype: torch.dtype) -> Any:
    levels = [_level(a, dtype) for a in clamp.args]
    return (
        None
        if None in levels
        else clamp.func(*(sympy.Rational(max(level, HIDDEN)) for level in levels if level is not None))
    )
