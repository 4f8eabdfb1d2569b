"""Which tokens each rank holds, and what cannot be split."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.scaling import BUDGETS, blocks_of_ranks, imbalance
from stem_compile.config import OptionError, StemConfig
from stem_compile.distributed import ORDERS, SplitError, TokenSplit
from stem_compile.distributed.balance import blocks_of_rows, dealt, table


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


@pytest.mark.parametrize("budget", BUDGETS)
def test_balanced_ranks_compute_nearly_the_same_number_of_blocks(budget: float) -> None:
    spec = StemConfig(budget=budget).selection_of(0)
    assert imbalance(blocks_of_ranks(blocks_of_rows(spec, 131072), 8, held=table(spec, 131072, 8))) < 0.05


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_table_of_chunks_is_put_together_too(ranks: int) -> None:
    held = table(StemConfig(budget=0.25, block_size=64).selection, 5000, ranks)
    assert sorted(n for hand in held for n in hand) == list(range(4 * ranks))
    whole = torch.arange(96 * ranks).reshape(-1, 2)
    parts = torch.stack([TokenSplit("", rank, ranks, table=held).part(whole, 0) for rank in range(ranks)])
    assert torch.equal(TokenSplit("", 0, ranks, table=held).gathered(parts, 0), whole)


def test_hands_are_dealt_evenly_and_are_of_one_size() -> None:
    costs = [9, 7, 6, 5, 4, 3, 2, 0]
    hands = dealt(costs, 2)
    assert [len(hand) for hand in hands] == [4, 4]
    assert [sum(costs[n] for n in hand) for hand in hands] == [18, 18]


def test_what_cannot_be_split_is_named() -> None:
    with pytest.raises(SplitError, match="7 tokens are not 4 chunks"):
        TokenSplit("", 0, 2).part(torch.zeros(7), 0)
    with pytest.raises(SplitError, match=r"stem_compile\.distributed\.shard"):
        TokenSplit("", 0, 2).chunk_length(7)
    with pytest.raises(OptionError, match=r"a 1-D torch\.distributed DeviceMesh or a ProcessGroup"):
        StemConfig(context_parallel="gloo")  # type: ignore[arg-type]
    with pytest.raises(SplitError, match="'zigzag', 'contiguous'"):
        TokenSplit.of(None, "ring")
