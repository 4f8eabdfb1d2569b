"""What a selection computes of a causal prompt before it has run: budgets are formulas of the length alone, and some
blocks are always computed, so that short prompts compute more than their budget says."""

from __future__ import annotations

import functools

import torch

from stem_compile.selection import SelectionSpec, policies
from stem_compile.selection.tpd import full_rows, row_limits

LENGTHS = tuple(1024 * 2**i * part // 4 for i in range(11) for part in (4, 5, 6, 7))
"""Lengths at which densities are compared with the budget: four steps a doubling, up to 2 million tokens."""
TOLERANCE = 0.1
"""Part of the budget by which a density may be above it and still be called kept."""


@functools.lru_cache(maxsize=1024)
def causal_density(spec: SelectionSpec, tokens: int) -> float:
    """Computed over visible block pairs of one causal prompt of ``tokens`` tokens, in (0, 1]; 1 for a policy that ranks
    no blocks. The lists of a policy that shares its budget otherwise (between heads, by mass) have this mean."""
    if not policies.get(spec.policy).SCORED:
        return 1.0
    ends = torch.arange(0, tokens, spec.block_q).add(spec.block_q).clamp(max=tokens)
    visible = (ends + spec.block_k - 1) // spec.block_k
    limit = row_limits(visible, spec)
    computed = torch.where(full_rows(visible, limit, spec), visible, limit)
    return float(computed.sum() / visible.sum())


@functools.lru_cache(maxsize=256)
def kept_from(spec: SelectionSpec) -> int | None:
    """Tokens from which on a causal prompt computes its budget, within ``TOLERANCE`` of it; None where the budget is
    the published schedule or is kept at none of ``LENGTHS``."""
    if spec.budget is None:
        return None
    shortest = None
    for tokens in reversed(LENGTHS):
        if causal_density(spec, tokens) > (1 + TOLERANCE) * spec.budget:
            break
        shortest = tokens
    return shortest
