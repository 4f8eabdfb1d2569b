"""How a row's blocks are divided among heads, and how many there are where a share of the mass decides.

Pooled masses (``mass.py``) of different heads are in one unit: so the heads of a layer, or those of one key head, may
put their budgets for a row together and spend them where most mass is. A head keeps at least its forced blocks and a
part of its own budget. With ``coverage`` a row takes the best blocks until they hold that share of what all its
candidates hold, and its budget is the most it may take. What is shared is shared within one row of query blocks of one
batch row: nothing depends on other rows.

The blocks of a head are its best ones, ties going to the earlier block; across heads ties go to the earlier head. So a
row is settled by how many blocks each head gets.
"""

from __future__ import annotations

import torch

from stem_compile.selection.spec import POINT, SelectionSpec


def divided(
    scores: torch.Tensor,
    forced: torch.Tensor,
    limit: torch.Tensor,
    full: torch.Tensor,
    spec: SelectionSpec,
    together: int,
) -> torch.Tensor:
    """Blocks that each head computes of each row: int64 [B, H, rows].

    scores: [B, H, rows, key blocks], -inf where nothing is visible. forced: bool, pairs that are computed whatever
    their score. limit: int64 [B, H, rows], each head's own budget, forced blocks included. full: bool [B, H, rows],
    rows that compute everything; they neither give nor take, and their result means nothing. together: heads that
    share.
    """
    columns = scores.shape[3]
    free = (scores > -torch.inf) & ~forced & ~full.unsqueeze(-1)
    held = forced.sum(-1)
    own = limit * (spec.kept_share if spec.coverage is None else 0)
    least = torch.maximum(held, (own + POINT - 1) // POINT)
    least = torch.where(full, 0, torch.minimum(least, limit))
    held, budget = (torch.where(full, 0, x) for x in (held, limit))

    ranked = _by_unit(together, scores.masked_fill(~free, -torch.inf)).flatten(3)
    order = torch.sort(ranked, dim=-1, descending=True, stable=True)
    place = torch.arange(ranked.shape[-1], device=scores.device).expand(ranked.shape)
    rank = torch.empty_like(order.indices).scatter_(-1, order.indices, place).unflatten(-1, (together, columns))
    rank = rank.masked_fill(~_by_unit(together, free), ranked.shape[-1])
    unit_held, unit_least, total = (
        _by_unit(together, held),
        _by_unit(together, least),
        _by_unit(together, budget).sum(-1),
    )

    def given(best: torch.Tensor) -> torch.Tensor:
        # Blocks of each head when the unit's ``best`` free pairs [B, units, rows] are taken.
        return torch.maximum(unit_least, unit_held + (rank < best[..., None, None]).sum(-1))

    # As many pairs as the budgets together allow: given() grows by at most one a step.
    low = torch.zeros_like(total)
    high = _by_unit(together, free).flatten(3).sum(-1)
    for _ in range(ranked.shape[-1].bit_length()):  # bisection, without asking the device whether it is done
        middle = (low + high + 1) // 2
        fits = given(middle).sum(-1) <= total
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle - 1)
    if spec.coverage is not None:
        low = torch.minimum(low, _covering(scores, forced, full, spec.coverage, order.values, together))
    blocks: torch.Tensor = given(low).transpose(2, 3).flatten(1, 2)
    return blocks


def _by_unit(together: int, x: torch.Tensor) -> torch.Tensor:
    """x [B, H, rows, ...] as [B, H / together, rows, together, ...]."""
    return x.view(x.shape[0], -1, together, *x.shape[2:]).transpose(2, 3)


def _covering(
    scores: torch.Tensor,
    forced: torch.Tensor,
    full: torch.Tensor,
    coverage: float,
    ordered: torch.Tensor,
    together: int,
) -> torch.Tensor:
    """Fewest of a unit's best free pairs that hold, with the forced ones, the share ``coverage`` of all its candidates:
    int64 [B, units, rows]. ordered: their scores, descending."""
    weight = scores.exp().masked_fill(full.unsqueeze(-1), 0)
    everything, kept = (_by_unit(together, x).flatten(3).sum(-1) for x in (weight, weight.masked_fill(~forced, 0)))
    missing = coverage * everything - kept
    before = ordered.exp().cumsum(-1) - ordered.exp()
    fewest: torch.Tensor = ((before < missing.unsqueeze(-1)) & (ordered > -torch.inf)).sum(-1)
    return fewest
