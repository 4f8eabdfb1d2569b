"""Block scores against a brute-force reading of Eq. 7 over token pairs, in fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from hypothesis import given, settings

from stem_compile.algebra import blocks
from stem_compile.algebra.masks import encode
from stem_compile.selection import Attention, SelectionSpec, oam
from tests.strategies import Case, cases, specs


def brute_force(case: Case, spec: SelectionSpec) -> torch.Tensor:
    """Every score from its definition, token pair by token pair."""
    q, k, v = case.qkv(torch.float64)
    mask, tensors = case.mask()
    visible = tensors[0] if tensors else torch.ones(case.batch, case.shape[3], dtype=torch.bool)
    possible = mask.dense(case.shape, tensors).expand(case.shape)
    batch, heads, q_len, kv_len = case.shape
    rows, columns = blocks.cdiv(q_len, spec.block_q), blocks.cdiv(kv_len, spec.block_k)
    scores = torch.full((batch, heads, rows, columns), -math.inf, dtype=torch.float64)
    stride = spec.stride
    for b in range(batch):
        for h in range(heads):
            key_head = h // case.group
            dots = q[b, h] @ k[b, key_head].T * case.scale
            norms = v[b, key_head].norm(dim=-1).masked_fill(~visible[b], 0)
            for i in range(rows):
                r = torch.arange(i * spec.block_q, min((i + 1) * spec.block_q, q_len))
                for j in range(columns):
                    c = torch.arange(j * spec.block_k, min((j + 1) * spec.block_k, kv_len))
                    if not possible[b, h][r][:, c].any():
                        continue
                    meets = (r[:, None] % stride + c[None, :] % stride == stride - 1) & visible[b][c][None, :]
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
                    scores[b, h, i, j] = pooled + spec.beta * max(0.0, math.log(max(float(norms[c].max()), 1e-300)))
    return scores


def attention(case: Case, spec: SelectionSpec, dtype: torch.dtype | None = None) -> Attention:
    mask, tensors = case.mask()
    q, k, v = case.qkv() if dtype is None else case.qkv(dtype)
    return Attention(q, k, v, encode(mask), case.scale, spec.text(), tensors=tensors)


@settings(max_examples=15)
@given(cases(longest=150), specs().map(lambda s: SelectionSpec(**{**s.__dict__, "metric": "paper"})))
def test_scores_follow_their_definition(case: Case, spec: SelectionSpec) -> None:
    ours = oam.oam_scores(attention(case, spec, torch.float64))
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, brute_force(case, spec))


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
