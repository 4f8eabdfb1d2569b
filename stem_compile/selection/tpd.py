"""Turn block scores into block lists: each row keeps the best blocks its policy's budget allows (Algorithm 1, section
3.1).

A row is known by its rank (visible blocks before its last one) and by the visible blocks of its batch row, so padding
and documents shrink budgets by themselves. Ties go to the earlier block: the selection is a pure function of the
scores.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F

from stem_compile.algebra import symbolic
from stem_compile.algebra.blocks import cdiv
from stem_compile.algebra.symbolic import BLOCKS, ROW
from stem_compile.selection import FULL, BlockSelection, SelectionSpec, packed, policies
from stem_compile.selection.policies import POLICIES
from stem_compile.selection.sharing import divided
from stem_compile.selection.spec import ALL


def list_width(spec: SelectionSpec, key_blocks: Any) -> Any:
    """Longest list a row can have: int, or SymInt for a symbolic number of key blocks. A chunk's rows have the whole
    prompt's budget."""
    return _known_width(spec, key_blocks) if isinstance(key_blocks, int) else _width(spec, key_blocks)


def _width(spec: SelectionSpec, key_blocks: Any) -> Any:
    total = torch.sym_max(key_blocks, cdiv(spec.prompt_length, spec.block_k))
    return torch.sym_min(policies.get(spec.policy).width(spec, total), key_blocks)


_known_width = POLICIES.caches(functools.lru_cache(maxsize=1024)(_width))
"""Asked at every call of a model's layers."""


@POLICIES.caches
@functools.lru_cache(maxsize=256)
def everything(spec: SelectionSpec) -> bool:
    """Whether every row of every length is FULL, so that no score is needed. A policy may mean something else by
    ``budget``, so what it grants the last row of some lengths decides."""
    policy = policies.get(spec.policy)
    if not policy.SCORED or spec.budget != 1.0 or spec.coverage is not None:
        return not policy.SCORED
    granted = policy.budget(spec)
    return all(bool(symbolic.evaluate(granted, {ROW: n - 1, BLOCKS: n}) >= n) for n in (1, 2, 57, 1000))


def tpd_select(
    scores: torch.Tensor, spec: SelectionSpec, reach: torch.Tensor | None = None, key_heads: int | None = None
) -> BlockSelection:
    """scores: [B, H, rows, key blocks], -inf where a block holds no visible key. Budgets are exact integer arithmetic
    (int64).

    reach: visible blocks of each row without the mask's far edges, broadcastable to [B, H, rows]; None where it has
    none. key_heads: heads of k, where those of one share budgets; None: as many as query heads.
    """
    columns = scores.shape[-1]
    candidates = scores > -torch.inf
    counts = row_counts(candidates.sum(-1), spec, reach)
    if spec.divides:
        counts = divided_counts(
            scores, candidates, counts, spec, spec.sharing_heads(scores.shape[1], key_heads or scores.shape[1])
        )
    width = int(list_width(spec, columns))
    indices = best_blocks(scores, candidates, counts, width if spec.share == "none" else columns, spec)
    if spec.share != "none":
        indices = packed(indices, counts, width)
    return BlockSelection(indices, counts, spec.block_q, spec.block_k, columns)


def divided_counts(
    scores: torch.Tensor, candidates: torch.Tensor, counts: torch.Tensor, spec: SelectionSpec, together: int
) -> torch.Tensor:
    """int32 [B, H, rows]: ``counts`` as the scores divide them among ``together`` heads that share budgets, or as far
    as the coverage asked for needs them. FULL rows stay FULL."""
    full = (counts == FULL).expand(scores.shape[:3])
    limit = counts.clamp(min=0).long().expand(scores.shape[:3])
    candidates = candidates.expand(scores.shape)
    blocks = divided(scores, forced(candidates, spec), limit, full, spec, together)
    return torch.where(full, FULL, blocks).int()


def forced(candidates: torch.Tensor, spec: SelectionSpec) -> torch.Tensor:
    """Bool: candidates that are computed whatever their score, a row's first ones (sinks) and its last (local)."""
    rank = candidates.cumsum(-1)
    kept: torch.Tensor = candidates & ((rank <= spec.sinks) | (rank > rank[..., -1:] - spec.locals))
    return kept


def best_blocks(
    scores: torch.Tensor, candidates: torch.Tensor, counts: torch.Tensor, width: int, spec: SelectionSpec
) -> torch.Tensor:
    """Each row's ``counts`` best candidates, ascending: int32 [..., rows, width], garbage past ``counts``.

    scores: [..., rows, columns]; candidates, counts: broadcastable to it and to its rows. Forced blocks rank above
    every score; ties go to the earlier block.
    """
    columns = scores.shape[-1]
    ranked = scores.masked_fill(~candidates, -torch.inf).masked_fill_(forced(candidates, spec), torch.inf)
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[..., :width]
    listed = torch.arange(order.shape[-1], device=scores.device) < counts.unsqueeze(-1)
    indices = torch.where(listed, order, columns).sort(-1).values.clamp(max=columns - 1).int()
    return F.pad(indices, (0, width - indices.shape[-1]))


def row_counts(visible: torch.Tensor, spec: SelectionSpec, reach: torch.Tensor | None = None) -> torch.Tensor:
    """int32 [..., rows]: length of each row's list, ``FULL`` for rows that compute all they see. visible: int64, blocks
    that a row may compute."""
    limit = row_limits(visible, spec, reach)
    return torch.where(full_rows(visible, limit, spec, reach), FULL, limit).int()


def row_limits(visible: torch.Tensor, spec: SelectionSpec, reach: torch.Tensor | None = None) -> torch.Tensor:
    """Blocks each row may compute. visible: int64 [..., rows], visible blocks a row; sinks and local blocks are always
    within."""
    reach = visible if reach is None else reach
    total = reach.amax(-1, keepdim=True).clamp(min=cdiv(spec.prompt_length, spec.block_k))
    budget = symbolic.evaluate(
        policies.get(spec.policy).budget(spec), {ROW: (reach - 1).clamp(min=0), BLOCKS: total.clamp(min=1)}
    )
    return torch.minimum(symbolic.as_tensor(budget, visible.device).clamp(min=spec.sinks + spec.locals), visible)


def full_rows(
    visible: torch.Tensor, limit: torch.Tensor, spec: SelectionSpec, reach: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows that compute all they see: the budget covers it, or the row holds an end of the prompt or of a document,
    where the question is.

    An end is a row after which the number of visible blocks no longer grows; a block of slack covers unaligned prefixes
    and query blocks below key blocks. Rows further on are right padding. A chunk of a longer prompt ends where the
    prompt does.
    """
    reach = visible if reach is None else reach
    slack, rows = cdiv(spec.block_k, spec.block_q) + 1, reach.shape[-1]
    before = F.pad(reach, (slack, 0))[..., :rows]
    after = reach[..., (torch.arange(rows, device=reach.device) + slack).clamp(max=rows - 1)]
    ends = (before < reach) & (after <= reach) & (reach >= cdiv(spec.prompt_length, spec.block_k))
    # Where coverage decides, the budget is but its bound: only rows that are all forced are known to be full.
    enough = limit if spec.coverage is None else spec.sinks + spec.locals
    full: torch.Tensor = ((enough >= visible) | ends | (reach == ALL)) & (visible > 0)
    return full
