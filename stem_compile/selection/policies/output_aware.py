"""Output-aware: one budget for every row, over output-aware block scores (arXiv 2603.06274, Eq. 5-7, without Eq. 3).

For attention without a causal order, where a budget that falls with position means nothing; also the ablation of TPD on
causal models.
"""

from __future__ import annotations

import math

import sympy

from stem_compile.algebra.symbolic import BLOCKS, FloorDiv
from stem_compile.selection import SelectionSpec
from stem_compile.selection.policy import Size

SCORED = True
ANY_ORDER = True
POINT = 1 << 16
"""Fixed-point denominator of the budget."""
DEFAULT = 0.25
"""Part of the visible blocks where no budget is given."""


def _share(spec: SelectionSpec) -> int:
    return round((DEFAULT if spec.budget is None else spec.budget) * POINT)


def budget(spec: SelectionSpec) -> sympy.Expr:
    """Blocks of any row of ``BLOCKS``: the budget's part of them, rounded up, at least 1."""
    return sympy.Max(FloorDiv(BLOCKS * _share(spec) + POINT - 1, POINT), 1)


def width(spec: SelectionSpec, key_blocks: Size) -> Size:
    """Every row's list has the same length."""
    return key_blocks * math.ceil(_share(spec) * 1024 / POINT) // 1024 + 2 + spec.sinks + spec.locals


def min_length(spec: SelectionSpec) -> int:
    """Tokens from which selecting starts to pay."""
    return 2048
