"""Selection: what must be kept is kept, nothing invisible is chosen, budgets are met and grow, equal inputs give equal
blocks."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stem_compile.algebra.masks import Causal, Padding, encode
from stem_compile.selection import FULL, Attention, BlockSelection, SelectionSpec, oam, policies, tpd
from tests.strategies import Case, cases, specs


def select(case: Case, spec: SelectionSpec) -> tuple[BlockSelection, torch.Tensor, torch.Tensor]:
    """(selection, its dense form, candidates)."""
    mask, tensors = case.mask()
    attention = Attention(*case.qkv(), encode(mask), case.scale, spec.text(), tensors=tensors)
    selection = tpd.tpd_select(oam.oam_scores(attention), spec)
    candidates = attention.candidates.expand(*selection.counts.shape, selection.key_blocks)
    return selection, selection.dense(candidates), candidates


@given(cases(longest=700), specs())
def test_what_must_be_kept_is_kept(case: Case, spec: SelectionSpec) -> None:
    selection, dense, candidates = select(case, spec)
    selection.check(candidates)
    assert not (dense & ~candidates).any()
    rank, total = candidates.cumsum(-1), candidates.sum(-1, keepdim=True)
    assert dense[candidates & (rank <= spec.sinks)].all()
    assert dense[candidates & (rank > total - spec.locals)].all()
    assert (dense.sum(-1) > 0).eq(candidates.sum(-1) > 0).all(), "a row that sees something computes something"


@given(cases(longest=700), specs())
def test_the_prompt_end_is_dense(case: Case, spec: SelectionSpec) -> None:
    _, dense, candidates = select(dataclasses.replace(case, padding="none"), spec)
    assert torch.equal(dense[:, :, -1], candidates[:, :, -1])


@given(cases(longest=700), specs())
def test_it_is_a_pure_function(case: Case, spec: SelectionSpec) -> None:
    first, again = select(case, spec)[0], select(case, spec)[0]
    assert torch.equal(first.counts, again.counts)
    assert torch.equal(first.indices, again.indices)


@given(cases(longest=700), specs(), st.sampled_from((0.1, 0.3, 0.6)))
def test_it_grows_with_the_budget(case: Case, spec: SelectionSpec, low: float) -> None:
    small = select(case, dataclasses.replace(spec, budget=low))[1]
    large = select(case, dataclasses.replace(spec, budget=low + 0.3))[1]
    assert not (small & ~large).any()


@pytest.mark.parametrize("budget", [0.05, 0.125, 0.25, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("mu", [0.0, 0.4, 0.7, 1.0])
@pytest.mark.parametrize("count", [20, 57, 128, 500, 1024, 8192])
def test_the_density_asked_for_is_computed(budget: float, mu: float, count: int) -> None:
    spec = SelectionSpec(budget=budget, mu=mu, sink_blocks=0, local_blocks=1)
    visible = torch.arange(1, count + 1)
    limits = tpd.row_limits(visible, spec)
    if mu * policies.get("stem").start_share(budget, mu) * count < spec.locals + 1:
        return  # rows that only hold what is always kept
    assert abs(int(limits.sum()) - budget * int(visible.sum())) <= count, "more than one block a row off"


@pytest.mark.parametrize(
    ("tokens", "share"),
    [
        (4096, 1.0),
        (8192, 0.81),
        (16384, 0.60),
        (32768, 0.33),
        (65536, 0.25),
        (131072, 0.207),
        (262144, 0.185),
        (1048576, 0.169),
    ],
)
def test_the_published_schedule_is_the_published_one(tokens: int, share: float) -> None:
    spec = SelectionSpec()
    visible = torch.arange(1, tokens // 128 + 1)
    computed = tpd.row_limits(visible, spec)
    assert float(computed.sum() / visible.sum()) == pytest.approx(share, abs=0.011)


@given(st.integers(1, 3000), specs())
def test_lists_fit_their_width(count: int, spec: SelectionSpec) -> None:
    visible = torch.arange(1, count + 1)
    limits = tpd.row_limits(visible, spec)
    listed = limits[~tpd.full_rows(visible, limits, spec)]
    assert not len(listed) or int(listed.max()) <= int(policies.get(spec.policy).width(spec, count))


def test_chunks_with_the_length_declared_select_as_one_shot_does() -> None:
    case = Case(q_len=1024, key_heads=2, group=2, head_dim=16)
    spec = SelectionSpec(budget=0.3, block_q=64, block_k=64, sink_blocks=1, local_blocks=1, prompt_length=1024)
    q, k, v = case.qkv()
    whole = select(case, spec)[1]
    for start, end in ((0, 512), (512, 1024)):
        part = q[:, :, start:end], k[:, :, :end], v[:, :, :end]
        attention = Attention(*part, encode(Causal(start)), case.scale, spec.text())
        chunk = tpd.tpd_select(oam.oam_scores(attention), spec)
        dense = chunk.dense(attention.candidates.expand(*chunk.counts.shape, chunk.key_blocks))
        assert torch.equal(dense, whole[:, :, start // 64 : end // 64, : end // 64])


def test_padding_on_the_right_selects_as_the_row_alone() -> None:
    spec = SelectionSpec(budget=0.3, block_q=64, block_k=64, sink_blocks=1, local_blocks=1)
    case = Case(q_len=1024, key_heads=2, group=2, seed=5)
    q, k, v = case.qkv()
    keep = torch.ones(1, 1024, dtype=torch.bool)
    keep[:, 640:] = False
    padded = Attention(q, k, v, encode(Causal() & Padding(0)), case.scale, spec.text(), tensors=[keep])
    alone = Attention(q[:, :, :640], k[:, :, :640], v[:, :, :640], encode(Causal()), case.scale, spec.text())
    wide, short = (
        tpd.tpd_select(oam.oam_scores(a), spec).dense(a.candidates.expand(1, 4, -1, -1)) for a in (padded, alone)
    )
    assert torch.equal(wide[:, :, :10, :10], short)


@pytest.mark.parametrize(
    ("indices", "count", "words"),
    [
        ([0, 2], 3, "count outside"),
        ([2, 1], 2, "ascending"),
        ([1, 1], 2, "ascending"),
        ([0, 9], 2, "index outside"),
        ([0, 3], 2, "without visible keys"),
    ],
)
def test_check_finds_what_is_wrong(indices: list[int], count: int, words: str) -> None:
    selection = BlockSelection(
        torch.tensor([[[indices]]], dtype=torch.int32), torch.tensor([[[count]]], dtype=torch.int32), 64, 64, 4
    )
    with pytest.raises(ValueError, match=words):
        selection.check(torch.tensor([True, True, True, False]))


def test_full_rows_compute_their_candidates() -> None:
    selection = BlockSelection(
        torch.zeros(1, 1, 2, 1, dtype=torch.int32), torch.tensor([[[FULL, 0]]], dtype=torch.int32), 64, 64, 3
    )
    candidates = torch.tensor([[[[True, False, True], [True, True, True]]]])
    assert torch.equal(selection.dense(candidates), torch.tensor([[[[True, False, True], [False, False, False]]]]))
    assert selection.density(candidates) == pytest.approx(2 / 5)
