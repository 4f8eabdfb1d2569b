"""Which tokens each rank holds, and what cannot be split."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.scaling import BUDGETS, blocks_of_ranks, blocks_of_rows, imbalance
from stem_compile.config import OptionError, StemConfig
from stem_compile.distributed import ORDERS, SplitError, TokenSplit


@pytest.mark.parametrize(("order", "ranks", "dim"), itertools.product(ORDERS, (1, 2, 3, 8), (0, 1)))
def test_parts_put_together_are_the_sequence(order: str, ranks: int, dim: int) -> None:
    whole = torch.arange(96).reshape(48, 2).movedim(0, dim)
    parts = torch.stack([TokenSplit("", rank, ranks, order).part(whole, dim) for rank in range(ranks)])
    assert torch.equal(TokenSplit("", 0, ranks, order).gathered(parts, dim), whole)


def test_zigzag_gives_a_rank_an_early_chunk_and_its_mirror() -> None:
    assert [TokenSplit("", rank, 4).held for rank in range(4)] == [(0, 7), (1, 6), (2, 5), (3, 4)]


@pytest.mark.parametrize("budget", BUDGETS)
def test_zigzag_is_more_even_than_contiguous(budget: float) -> None:
    rows = blocks_of_rows(StemConfig(budget=budget).selection_of(0), 131072)
    zigzag, contiguous = (imbalance(blocks_of_ranks(rows, 8, order)) for order in ("zigzag", "contiguous"))
    assert zigzag < contiguous
    assert zigzag < 1e-9 or budget < 1


def test_what_cannot_be_split_is_named() -> None:
    with pytest.raises(SplitError, match="7 tokens are not 4 chunks"):
        TokenSplit("", 0, 2).part(torch.zeros(7), 0)
    with pytest.raises(SplitError, match=r"stem_compile\.distributed\.shard"):
        TokenSplit("", 0, 2).chunk_length(7)
    with pytest.raises(OptionError, match=r"a 1-D torch\.distributed DeviceMesh or a ProcessGroup"):
        StemConfig(context_parallel="gloo")  # type: ignore[arg-type]
    with pytest.raises(SplitError, match="'zigzag', 'contiguous'"):
        TokenSplit.of(None, "ring")
