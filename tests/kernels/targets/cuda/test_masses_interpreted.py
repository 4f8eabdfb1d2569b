"""Mass pooling on the GPU target in Triton's interpreter: scores, divided budgets and packed lists against their
definitions."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stem_compile.algebra import symbolic
from stem_compile.selection import FULL, SelectionSpec, policies, tpd
from stem_compile.selection.mass import log_masses
from tests.kernels.kernel_cases import (
    ALIBI,
    BIAS,
    CAUSAL,
    DOCUMENT,
    EDGED,
    LEFT_CHUNKED,
    MASKS,
    PADDED,
    SHIFTED,
    SINK,
    SOFTCAP,
    Case,
)

pytest.importorskip("triton")
from stem_compile.kernels.targets.cuda import selection as gpu_selection
from stem_compile.kernels.targets.cuda import target as cuda
from stem_compile.kernels.targets.cuda.masses import Means

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the compiled kernels")
FIXED_LENGTHS = (CAUSAL, DOCUMENT, LEFT_CHUNKED)


@st.composite
def cases(draw: Any) -> tuple[Case, SelectionSpec]:
    mask = draw(st.sampled_from([*MASKS, *EDGED]))
    q_len, key_heads = draw(st.integers(1, 80)), draw(st.integers(1, 2))
    case = Case(
        q_len=q_len,
        kv_len=q_len + (0 if mask in FIXED_LENGTHS else draw(st.integers(0, 50))),
        batch=draw(st.integers(1, 2)),
        heads=key_heads * draw(st.integers(1, 2)),
        key_heads=key_heads,
        head_dim=draw(st.sampled_from([16, 40])),
        value_dim=draw(st.sampled_from([16, 24])),
        dtype=draw(st.sampled_from([torch.float32, torch.float16])),
        mask=mask,
        kind=draw(st.sampled_from(["", SOFTCAP + SINK, ALIBI, BIAS])),
        pad=draw(st.sampled_from(["left", "right", "holes"])),
        layout=draw(st.sampled_from(["bhnd", "bnhd", "sliced"])),
        seed=draw(st.integers(0, 99)),
    )
    return case, spec(
        key_stride=draw(st.sampled_from([4, 8])),
        share=draw(st.sampled_from(["none", "heads", "group"])),
        coverage=draw(st.sampled_from([None, 0.8])),
        metric=draw(st.sampled_from(["paper", "released"])),
    )


def spec(**changes: Any) -> SelectionSpec:
    plain = SelectionSpec(
        budget=0.4, pooling="mass", stride=4, block_q=32, block_k=16, sink_blocks=0, local_blocks=1, share="heads"
    )
    return dataclasses.replace(plain, **changes)


@settings(max_examples=8, deadline=None)
@given(cases())
@example((Case(90, 130, 2, 4, 2, mask=PADDED, pad="holes", kind=ALIBI), spec(share="group", coverage=0.9)))
@example((Case(90, 120, 1, 2, 1, mask=SHIFTED, kind=SINK, dtype=torch.float16), spec()))
@example((Case(90, 90, 2, 2, 2, mask=DOCUMENT), spec(key_stride=8)))
def test_selection_by_mass(drawn: tuple[Case, SelectionSpec]) -> None:
    case, selection_spec = drawn
    attention = case.attention(spec_text=selection_spec.text())
    candidates = attention.candidates
    expected = log_masses(attention)
    pairs = candidates.expand(expected.shape)
    scores = torch.where(pairs, Means(attention).scores(0, expected.shape[2]), -torch.inf)
    tolerance = 2e-4 if case.dtype == torch.float32 else 0.05
    # A block of which next to nothing is left is next to nothing in any rounding.
    gap = (scores - expected)[pairs & (expected > -60)].abs()
    assert not gap.numel() or float(gap.max()) < tolerance, case
    lists = attention.selection(*cuda.select(attention, "select"))
    lists.check(candidates)
    exact = tpd.tpd_select(scores, selection_spec, attention.reach, case.key_heads)
    assert torch.equal(lists.counts == FULL, exact.counts == FULL)
    differing = lists.dense(candidates) != exact.dense(candidates)
    # Coverage adds masses up in another order.
    assert not differing.any() or (selection_spec.coverage is not None and differing.float().mean() < 0.01), case


def test_packed_lists_compute_what_the_same_lists_compute_apart() -> None:
    case = Case(200, 200, heads=4, key_heads=2, mask=CAUSAL)
    attention = case.attention(spec_text=spec(stride=4).text())
    lists = attention.selection(*cuda.select(attention, "select"))
    assert lists.indices.dim() == 3
    apart = dataclasses.replace(lists, indices=lists.lists.contiguous())
    kernel = cuda.kernels(attention).attend
    assert torch.equal(cuda.attend(attention, lists, kernel), cuda.attend(attention, apart, kernel))


def test_more_pairs_than_a_program_ranks_are_divided_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = Case(200, 230, 2, heads=4, key_heads=2, mask=PADDED, pad="left").attention(spec_text=spec().text())
    expected = attention.selection(*cuda.select(attention, "select"))
    monkeypatch.setattr(gpu_selection, "SHARED_PAIRS", 0)
    lists = attention.selection(*cuda.select(attention, "select"))
    assert torch.equal(lists.counts, expected.counts)
    assert torch.equal(lists.dense(attention.candidates), expected.dense(attention.candidates))


def test_lists_without_scores_lie_end_to_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy may list blocks where nothing ranks them."""
    # Lengths that no other test has, so that no cached kernel has the policy's own budget in it.
    selection_spec = spec(budget=1.0, sink_blocks=1, local_blocks=2, prompt_length=208)
    attention = Case(208, 208, heads=4, key_heads=2, mask=CAUSAL).attention(spec_text=selection_spec.text())
    half = symbolic.FloorDiv(symbolic.BLOCKS, 2) + 1
    monkeypatch.setattr(policies.get("stem"), "budget", lambda spec: half)
    monkeypatch.setattr(policies.get("stem"), "SCORED", False)
    lists = attention.selection(*cuda.select(attention, "select"))
    assert (lists.counts > 0).any()
    lists.check(attention.candidates)
    expected = tpd.row_counts(attention.candidates.sum(-1), selection_spec).expand(lists.counts.shape)
    assert torch.equal(lists.counts, expected)
