"""Block scores against a brute-force reading of Eq. 7 over token pairs, in fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_compile.algebra.masks import decode, encode
from stem_compile.selection import Attention, SelectionSpec, oam
from tests.strategies import Case, cases, specs


def brute_force(attention: Attention) -> torch.Tensor:
    """Every score from its definition, token pair by token pair."""
    q, k, v, spec = attention.q, attention.k, attention.v, attention.spec
    (batch, heads, q_len, kv_len), (rows, columns) = attention.shape, attention.blocks
    possible = attention.mask.dense().expand(attention.shape)
    visible = attention.mask.visible
    counted = possible if oam.hides_pairs(attention) else torch.ones_like(possible)
    if visible is not None:
        counted = counted & visible[:, None, None].expand(attention.shape)
    scores = torch.full((batch, heads, rows, columns), -math.inf, dtype=torch.float64)
    stride = spec.stride
    for b in range(batch):
        for h in range(heads):
            key_head = h // attention.group
            dots = q[b, h] @ k[b, key_head].T * attention.scale
            norms = v[b, key_head].norm(dim=-1)
            for i in range(rows):
                r = torch.arange(i * spec.block_q, min((i + 1) * spec.block_q, q_len))
                for j in range(columns):
                    c = torch.arange(j * spec.block_k, min((j + 1) * spec.block_k, kv_len))
                    if not possible[b, h][r][:, c].any():
                        continue
                    met = r[:, None] % stride + c[None, :] % stride == stride - 1
                    meets = met & counted[b, h][r][:, c]
                    pairs = dots[r][:, c]
                    if spec.pooling == "mean":
                        pooled = pairs[meets].mean() if meets.any() else torch.tensor(0.0, dtype=torch.float64)
                    else:
                        cells = [
                            pairs[(r[:, None] // stride == gq) & (c[None, :] // stride == gk) & meets].mean()
                            for gq in r.div(stride, rounding_mode="floor").unique()
                            for gk in c.div(stride, rounding_mode="floor").unique()
                            if ((r[:, None] // stride == gq) & (c[None, :] // stride == gk) & meets).any()
                        ]
                        pooled = torch.stack(cells).max() if cells else torch.tensor(0.0, dtype=torch.float64)
                    # A norm counts where its key does: wherever it is visible, or in a pair that is.
                    shown = meets.any(0) if oam.hides_pairs(attention) else counted[b, h, 0][c]
                    largest = float(norms[c].masked_fill(~shown, 0).max())
                    scores[b, h, i, j] = pooled + spec.beta * max(0.0, math.log(max(largest, 1e-300)))
    return scores


def attention(case: Case, spec: SelectionSpec, dtype: torch.dtype | None = None) -> Attention:
    mask, tensors = case.mask()
    q, k, v = case.qkv() if dtype is None else case.qkv(dtype)
    return Attention(q, k, v, encode(mask), case.scale, spec.text(), tensors=tensors)


@settings(max_examples=15)
@given(cases(longest=150), specs().map(lambda s: SelectionSpec(**{**s.__dict__, "metric": "paper"})))
def test_scores_follow_their_definition(case: Case, spec: SelectionSpec) -> None:
    given = attention(case, spec, torch.float64)
    ours = oam.oam_scores(given)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, brute_force(given))


MASKS = {
    "given": "(kv <= q) & Ne(T0(b, h, q, kv), 0)",
    "documents": "(kv <= q) & Eq(T0(b, q), T0(b, kv))",
    "prefix": "(kv <= q) | (kv < 50)",
    "by head": "(kv <= q) & (kv > q - 64 - 150*h)",
    "window without sinks": "(kv <= q) & (kv > q - 90)",
}


def under(mask: str, spec: SelectionSpec, length: int = 200, seed: int = 0) -> Attention:
    """Attention in fp64 under a mask that hides single pairs."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, length, 16, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    tensors = {
        "given": lambda: torch.rand(2, 4, length, length, generator=generator) < 0.3,
        "documents": lambda: (torch.rand(2, length, generator=generator) < 0.02).cumsum(-1),
    }
    read = [tensors[mask]()] if mask in tensors else []
    text = encode(decode(MASKS[mask]))
    return Attention(q, k, v, text, 0.3, replace(spec, sink_blocks=0).text(), tensors=read)


@settings(max_examples=12)
@given(st.sampled_from(sorted(MASKS)), specs().map(lambda s: replace(s, metric="paper", beta=0.2)), st.integers(0, 99))
def test_scores_under_masks_that_hide_single_pairs(mask: str, spec: SelectionSpec, seed: int) -> None:
    given = under(mask, spec, seed=seed)
    assert oam.hides_pairs(given)
    torch.testing.assert_close(oam.oam_scores(given), brute_force(given))


@pytest.mark.parametrize("poison", [1e6, float("inf"), float("nan")])
@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("metric", ["paper", "released"])
@pytest.mark.parametrize("mask", sorted(MASKS))
def test_what_a_row_of_blocks_does_not_see_says_nothing(mask: str, metric: str, pooling: str, poison: float) -> None:
    spec = SelectionSpec(metric=metric, pooling=pooling, block_q=32, block_k=32, stride=8)
    given = under(mask, spec, 160)
    # Keys that no query of a row sees, for each row of blocks.
    shown = given.mask.dense().expand(given.shape).unflatten(2, (-1, 32)).any(3)
    before = oam.oam_scores(given)
    for row in range(shown.shape[2]):
        hidden = ~shown[:, :, row].unflatten(1, (2, -1)).any(2)[..., None]
        spoilt = replace(given, k=given.k.masked_fill(hidden, poison), v=given.v.masked_fill(hidden, poison))
        after = oam.oam_scores(spoilt)
        rows = hidden.any((1, 2, 3))
        torch.testing.assert_close(after[rows, :, row], before[rows, :, row])


@given(cases(dtypes=(torch.float32, torch.bfloat16, torch.float16)), specs())
def test_scores_are_fp32_and_finite_where_there_is_a_candidate(case: Case, spec: SelectionSpec) -> None:
    given = attention(case, spec)
    ours = oam.oam_scores(given)
    assert ours.dtype == torch.float32
    assert torch.equal(ours > -torch.inf, given.candidates.expand(ours.shape))
    assert not ours.isnan().any()


def test_larger_values_attract() -> None:
    plain = attention(Case(q_len=512), SelectionSpec(block_q=64, block_k=64))
    louder = replace(plain, v=plain.v.clone())
    louder.v[:, :, 70] *= 100
    gain = (oam.oam_scores(louder) - oam.oam_scores(plain))[0, 0, 5]
    assert gain[1] > 0.2 * math.log(50)
    assert gain[[0, 2, 3]].abs().max() == 0
