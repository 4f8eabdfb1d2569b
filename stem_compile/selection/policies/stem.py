"""Stem: Token Position-Decay budgets (arXiv 2603.06274, Eq. 3) over output-aware block scores.

Rows below k_start compute everything; from there the budget falls linearly to mu * k_start at the last row. k_start
comes from the published length schedule (released code, AngelSlim) or, for ``budget=b``, from the closed form that
makes the computed share of the causal
triangle b: with x = k_start / n, x^2 / 2 + (1 + mu) / 2 * (x - x^2) = b / 2, so x = (1 + mu - sqrt((1 + mu)^2 - 4 mu
b)) / (2 mu).
"""

from __future__ import annotations

import math

import sympy

from stem_compile.algebra.symbolic import BLOCKS, ROW, FloorDiv, Where
from stem_compile.selection import SelectionSpec
from stem_compile.selection.policy import Size

SCORED = True
ANY_ORDER = False
POINT = 1 << 10
"""Fixed-point denominator of budgets: integers stay exact and under 2^63 up to 2^14 blocks."""
SCHEDULE_BLOCKS = 56, 160
"""Published thresholds in blocks of 128 tokens: dense below the first, another slope from the second."""


def start_share(budget: float, mu: float) -> float:
    """k_start / n for which the linear decay computes ``budget`` of the causal triangle."""
    if mu == 0:
        return budget
    return (1 + mu - math.sqrt((1 + mu) ** 2 - 4 * mu * budget)) / (2 * mu)


def budget(spec: SelectionSpec) -> sympy.Expr:
    """Blocks of row ``ROW`` (0-based) of ``BLOCKS``, rounded to nearest under ``budget=``, floored under the schedule,
    at least 1."""
    decay = 1000 - round(1000 * spec.mu)
    if spec.budget is None:
        start = POINT * _schedule_start(spec)
        rounding = 0
    else:
        start = FloorDiv(round(start_share(spec.budget, spec.mu) * (1 << 16)) * BLOCKS, (1 << 16) // POINT)
        rounding = POINT // 2
    beyond = sympy.Max(ROW * POINT - start, 0)
    # The released schedule's linspace reaches mu * k at the last row; the closed form integrates to one row beyond.
    last = BLOCKS - 1 if spec.budget is None else BLOCKS
    span = sympy.Max(last * POINT - start, 1)
    loss = FloorDiv(FloorDiv(start * decay, 1000) * beyond, span)
    blocks = sympy.Max(FloorDiv(start - loss + rounding, POINT), 1)
    return Where(sympy.Le(ROW * POINT, start), ROW + 1, blocks)


def _schedule_start(spec: SelectionSpec) -> sympy.Expr:
    # The schedule is in blocks of 128 tokens; other block sizes keep its share of the tokens.
    unit = sympy.Rational(128, spec.block_k)
    low, high = (int(n * unit) for n in SCHEDULE_BLOCKS)
    base = int(30 * unit)
    return Where(BLOCKS < low, BLOCKS, Where(BLOCKS < high, FloorDiv(BLOCKS, 5) + base, FloorDiv(BLOCKS, 10) + base))


def width(spec: SelectionSpec, key_blocks: Size) -> Size:
    """Longest listed row: k_start, or sinks and local blocks where those are more."""
    forced = spec.sinks + spec.locals
    if spec.budget is None:
        # floor(n/5) + 30 below 160 blocks stays under n/10 + 46.
        return key_blocks // 10 + 46 * 128 // spec.block_k + forced
    return key_blocks * math.ceil(start_share(spec.budget, spec.mu) * 1024) // 1024 + 2 + forced


def min_length(spec: SelectionSpec) -> int:
    """Tokens below which the schedule is dense anyway; with ``budget=``, where selecting starts to pay."""
    return SCHEDULE_BLOCKS[0] * 128 if spec.budget is None else 2048
