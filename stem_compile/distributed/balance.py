"""A split whose ranks compute as many blocks each as a budget lets them, found from the budget's formulas."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from stem_compile.distributed.split import SplitError, TokenSplit
from stem_compile.selection.spec import SelectionSpec
from stem_compile.selection.tpd import full_rows, row_limits

CHUNKS = 4
"""Chunks a rank holds. Each is an attention call of its own; with fewer, chunks are too coarse to even out."""


def blocks_of_rows(spec: SelectionSpec, tokens: int) -> torch.Tensor:
    """Blocks that each row of blocks of a causal prompt of ``tokens`` tokens computes: int64 [query blocks]."""
    ends = torch.arange(0, tokens, spec.block_q).add(spec.block_q).clamp(max=tokens)
    visible = (ends + spec.block_k - 1) // spec.block_k
    limit = row_limits(visible, spec)
    return torch.where(full_rows(visible, limit, spec), visible, limit)


def balanced(mesh: Any, spec: SelectionSpec, tokens: int) -> TokenSplit:
    """A split over ``mesh`` that balances the blocks computed, to be given in place of the mesh to ``shard``,
    ``unshard`` and option ``context_parallel``.

    mesh: 1-D DeviceMesh or ProcessGroup. spec: ``StemConfig(budget=0.25).selection``; attentions with another budget
    are computed right, less evenly. tokens: length of the prompt, before padding; another length likewise. Every rank
    must give the same. Raises SplitError for a mesh that does not fit or no tokens.
    """
    split = TokenSplit.of(mesh)
    if tokens < 1:
        raise SplitError(f"tokens={tokens!r}: the length of the prompt, at least 1")
    return dataclasses.replace(split, table=table(spec, tokens, split.ranks))


def table(spec: SelectionSpec, tokens: int, ranks: int) -> tuple[tuple[int, ...], ...]:
    """Numbers of the chunks that each rank holds, ascending, for a causal prompt of ``tokens`` tokens."""
    whole = CHUNKS * ranks * spec.block_q
    rows = blocks_of_rows(spec, tokens + -tokens % whole)
    return dealt([int(n) for n in rows.reshape(CHUNKS * ranks, -1).sum(1)], ranks)


def dealt(costs: Sequence[int], ranks: int) -> tuple[tuple[int, ...], ...]:
    """Equally many of ``costs``, by number, for each of ``ranks`` ranks: the dearest that is left goes to the rank with
    the least so far (longest processing time first, Graham 1969), then pairs are swapped while that helps the
    busiest."""
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for number in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        rank = min((r for r in range(ranks) if len(hands[r]) * ranks < len(costs)), key=lambda r: (loads[r], r))
        hands[rank].append(number)
        loads[rank] += costs[number]
    while _swapped(hands, loads, costs):
        pass
    return tuple(tuple(sorted(hand)) for hand in hands)


def _swapped(hands: list[list[int]], loads: list[int], costs: Sequence[int]) -> bool:
    """Swap the pair of chunks after which the busiest rank and the other have the least at most. False: none helps."""
    busiest = max(range(len(loads)), key=loads.__getitem__)
    best = (loads[busiest], 0, 0, 0)
    for other in range(len(hands)):
        for i, mine in enumerate(hands[busiest]):
            for j, theirs in enumerate(hands[other]):
                less = costs[mine] - costs[theirs]
                best = min(best, (max(loads[busiest] - less, loads[other] + less), other, i, j))
    if best[0] >= loads[busiest]:
        return False
    _, other, i, j = best
    less = costs[hands[busiest][i]] - costs[hands[other][j]]
    hands[busiest][i], hands[other][j] = hands[other][j], hands[busiest][i]
    loads[busiest] -= less
    loads[other] += less
    return True
