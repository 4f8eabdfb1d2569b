"""Rows that see no key: found as looking at every score finds them, and ruled out where a mask shows that there are
none."""

from __future__ import annotations

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_compile.algebra import blind, symbolic
from stem_compile.algebra.blind import blind_rows, can_be_blind
from stem_compile.algebra.masks import Causal, Chunks, Mask, Padding, Window, predicate
from stem_compile.algebra.symbolic import KV, KV_LEN, Q_LEN, B, H, Q
from tests.strategies import terms

DOCUMENTS = sympy.Eq(symbolic.tensor(0)(B, Q), symbolic.tensor(0)(B, KV))
HEADS = predicate(sympy.Le(KV + H, Q))
MASKS = st.one_of(
    terms(),
    st.builds(lambda o, w: Causal(o) & Window(o - w), st.integers(-20, 40), st.integers(0, 30)),
    st.builds(lambda o, w: Causal(o) & Window(o - w) & Padding(0), st.integers(-20, 40), st.integers(0, 30)),
    st.builds(
        lambda o, s, a, b: Causal(o) & Chunks(s, a, b) & Padding(0),
        st.integers(-20, 40),
        st.integers(2, 20),
        st.integers(0, 9),
        st.integers(0, 9),
    ),
    st.builds(lambda o: Causal(o) & predicate(DOCUMENTS) & HEADS, st.integers(-20, 40)),
)


@settings(max_examples=150)
@given(MASKS, st.integers(1, 70), st.integers(1, 90), st.integers(1, 3), st.floats(0, 1), st.integers(1, 4000))
def test_they_are_those_of_the_dense_mask(
    mask: Mask, q_len: int, kv_len: int, batch: int, share: float, elements: int
) -> None:
    tensors = [torch.rand(batch, max(q_len, kv_len), generator=torch.Generator().manual_seed(q_len)) < share]
    shape = (batch, 2, q_len, kv_len)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blind, "ELEMENTS", elements)
        rows = blind_rows(mask, shape, tensors, (), torch.device("cpu"))
    heads = 2 if H in mask.predicate.free_symbols else 1
    assert rows.shape == (batch, heads, q_len, 1)
    dense = mask.dense(shape, tensors).expand(batch, 2, q_len, kv_len)[:, :heads]
    assert torch.equal(rows, ~dense.any(-1, keepdim=True))
    if kv_len >= q_len:
        assert can_be_blind(mask.predicate, kv_len - q_len) or not rows.any()


@pytest.mark.parametrize(
    "mask",
    [
        Causal(0),
        Causal(5),
        Causal(0) & Window(-7),
        Causal(3) & Chunks(8, 3, 0),
        predicate(DOCUMENTS) & Causal(0),
        Causal(-2) | predicate(KV < 3),
        predicate(sympy.Le(symbolic.tensor(0)(B, KV), symbolic.tensor(0)(B, Q))) & predicate(DOCUMENTS),
    ],
    ids=str,
)
def test_masks_that_show_every_row_a_key(mask: Mask) -> None:
    assert not can_be_blind(mask.predicate, 3 if mask == Causal(3) & Chunks(8, 3, 0) else 0)


@pytest.mark.parametrize(
    "mask",
    [Causal(-1), Causal(0) & Padding(0), Causal(0) & Window(1), predicate(DOCUMENTS) & predicate(KV < Q)],
    ids=str,
)
def test_masks_that_may_not(mask: Mask) -> None:
    assert can_be_blind(mask.predicate, 0)


def test_a_symbolic_prefix_shows_every_row_a_key() -> None:
    mask = Causal(KV_LEN - Q_LEN) & Window(KV_LEN - Q_LEN - 8)
    before = sympy.Symbol("s1", integer=True, positive=True)
    assert not can_be_blind(mask.predicate.subs(KV_LEN, Q_LEN + before), before)


def test_memory_does_not_grow_with_the_square() -> None:
    """At 40,000 tokens one Boolean a score would be 1.6 GB; what looks keys up looks at rows that do not see
    their own."""
    keep = torch.ones(1, 40_000, dtype=torch.bool)
    keep[0, :17] = False
    shape = (1, 1, 40_000, 40_000)
    for mask in (
        Causal(0) & Padding(0),
        Causal(0) & Padding(0) & predicate(sympy.Ne(sympy.Mod(KV, 4), 3) | sympy.Eq(KV, Q)),
    ):
        assert blind_rows(mask, shape, [keep], (), torch.device("cpu"))[0, 0, :, 0].nonzero()[:, 0].tolist() == list(
            range(17)
        )
