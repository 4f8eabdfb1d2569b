"""Attention as people write it out: every spelling is rewritten and equal to eager, or refused for the right reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stem_compile.passes.graph.sites import Rejected
from stem_compile.reasons import Reason
from tests.numerics import assert_close
from tests.passes.by_hand import randn
from tests.passes.capture import rewritten

N = 72
Model = Callable[..., Any]
FOUR = (2, 4, N, 16)


def _causal(scores: torch.Tensor) -> torch.Tensor:
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf)


def _product(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(-1, -2) * 0.25


def _exponentials(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = torch.exp(_causal(_product(q, k)))
    return (weights / weights.sum(-1, keepdim=True)) @ v


def _shifted_exponentials(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = _causal(_product(q, k))
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(dim=-1, keepdim=True)) @ v


def _by_log_sum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = _causal(_product(q, k))
    return torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True)) @ v


def _sink_first(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
    column = sink.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
    return torch.cat([column, _causal(_product(q, k))], -1).softmax(-1)[..., 1:] @ v


def _out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.empty(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    torch.matmul(q, k.transpose(-1, -2), out=scores)
    return _causal(scores).softmax(-1) @ v


def _grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(q.shape[3])
    scores = torch.einsum("bgrid,bgjd->bgrij", q, k) + slopes.view(2, 2, 1, 1) * (rows[None, :] - rows[:, None])
    return torch.einsum("bgrij,bgjd->bigrd", _causal(scores).softmax(-1), v)


def _masks(join: Callable[..., torch.Tensor]) -> Model:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None, :]
        causal, window = torch.where(j <= i, 0.0, -1e9), torch.where((j > i - 9) & (j <= i), 0.0, -1e9)
        return (_product(q, k) + join(causal, window)).softmax(-1) @ v

    return model


QKV = tuple(randn(*FOUR, seed=seed) for seed in range(3))
ONE = tuple(x[0, 0] for x in QKV)
ODD = (torch.arange(N) % 2).float().expand(N, N)
SPELLINGS: dict[str, tuple[Model, tuple[torch.Tensor, ...]]] = {
    "einsum with a shared key": (
        lambda q, k, v: torch.einsum(
            "bhij,bjd->bhid", _causal(torch.einsum("bhid,bjd->bhij", q, k)).softmax(-1), v
        ),
        (QKV[0], QKV[1][:, 0], QKV[2][:, 0]),
    ),
    "einsum with an ellipsis": (
        lambda q, k, v: torch.einsum(
            "...ij,...jd->...id", _causal(torch.einsum("...id,...jd->...ij", q, k)).softmax(-1), v
        ),
        QKV,
    ),
    "grouped heads": (_grouped, (QKV[0].view(2, 2, 2, N, 16), QKV[1][:, :2], QKV[2][:, :2], randn(4, seed=7))),
    "mm": (lambda q, k, v: torch.mm(_causal(torch.mm(q, k.t())).softmax(-1), v), ONE),
    "linear": (lambda q, k, v: F.linear(_causal(F.linear(q, k)).softmax(-1), v.t()), ONE),
    "tensordot": (
        lambda q, k, v: torch.tensordot(_causal(torch.tensordot(q, k, dims=([1], [1]))).softmax(-1), v, dims=1),
        ONE,
    ),
    "multiplied and summed": (
        lambda q, k, v: (
            _causal((q.unsqueeze(3) * k[:, :, None]).sum(-1)).softmax(-1)[..., None] * v[:, :, None]
        ).sum(3),
        QKV,
    ),
    "exponentials over their sum": (_exponentials, QKV),
    "shifted exponentials": (_shifted_exponentials, QKV),
    "by the logarithm of the sum": (_by_log_sum, QKV),
    "exponential of log_softmax": (lambda q, k, v: F.log_softmax(_causal(_product(q, k)), -1).exp() @ v, QKV),
    "sink in front": (_sink_first, (*QKV, randn(4))),
    "a result given": (_out, QKV),
    "smaller of two masks": (_masks(torch.minimum), QKV),
    "greater of two masks": (_masks(torch.maximum), QKV),
    "logarithm of a triangle": (lambda q, k, v: (_product(q, k) + torch.ones(N, N).tril().log()).softmax(-1) @ v, QKV),
    "frames causal among each other": (
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=(torch.arange(N)[:, None] // 16) >= (torch.arange(N)[None, :] // 16)
        ),
        QKV,
    ),
    "frames of a few before": (
        lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, attn_mask=((d := torch.arange(N)[:, None] // 8 - torch.arange(N)[None, :] // 8) >= 0) & (d < 4)
        ),
        QKV,
    ),
    "exclusive or of two conditions": (
        lambda q, k, v: F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=((torch.arange(N)[None] <= torch.arange(N)[:, None]) ^ (torch.arange(N)[None] < 5))
            | torch.eye(N, dtype=torch.bool),
        ),
        QKV,
    ),
    "infinities replaced": (lambda q, k, v: torch.nan_to_num(_causal(_product(q, k))).softmax(-1) @ v, QKV),
    "squashed": (lambda q, k, v: _causal(torch.sigmoid(_product(q, k))).softmax(-1) @ v, QKV),
    "rectified, leaking": (lambda q, k, v: _causal(F.leaky_relu(_product(q, k), 0.2)).softmax(-1) @ v, QKV),
    "a mask that grows a dimension": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, (torch.ones(N, N).tril() > 0).unsqueeze_(0)),
        QKV,
    ),
    "einsum by numbers": (
        lambda q, k, v: torch.einsum(
            _causal(torch.einsum(q, [0, 1, 2, 4], k, [0, 1, 3, 4], [0, 1, 2, 3])).softmax(-1),
            [0, 1, 2, 3],
            v,
            [0, 1, 3, 4],
            [0, 1, 2, 4],
        ),
        QKV,
    ),
    "a softmax written into a result": (
        lambda q, k, v: torch.softmax(_causal(_product(q, k)), -1, out=torch.empty(2, 4, N, N)) @ v,
        QKV,
    ),
    "rectified": (lambda q, k, v: _causal(F.relu(_product(q, k))).softmax(-1) @ v, QKV),
    "a batch alone": (lambda q, k, v: _causal(torch.bmm(q, k.transpose(1, 2))).softmax(-1).bmm(v), (
        QKV[0][:, 0], QKV[1][:, 0], QKV[2][:, 0],
    )),
    "visible at -9000": (
        lambda q, k, v: (_product(q, k) + torch.where(torch.ones(N, N).tril() > 0, -9000.0, -1e9)).softmax(-1) @ v,
        QKV,
    ),
    "given, visible at -9000": (
        lambda q, k, v, m: (_product(q, k) + m).softmax(-1) @ v,
        (*QKV, torch.where(torch.ones(N, N).tril() > 0, -9000.0, -1e9)),
    ),
    "given, lowest where it is visible": (
        lambda q, k, v, m: _causal(_product(q, k) + m).softmax(-1) @ v,
        (*QKV, torch.where(torch.ones(N, N).tril() > 0, -9000.0, 0.0)),
    ),
    "given twice, each the other's complement": (
        lambda q, k, v, a, b: (_product(q, k) + a + b).softmax(-1) @ v,
        (*QKV, -9000.0 * ODD, -9000.0 * (1 - ODD)),
    ),
    "given, visible at -9000 here and there": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
        (*QKV, (-9000.0 * (randn(N, N) > 0)).masked_fill(torch.ones(N, N).triu(1) > 0, -torch.inf)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_spelling_is_rewritten_and_equal_to_eager(name: str) -> None:
    model, inputs = SPELLINGS[name]
    result, out = rewritten(model, inputs)
    assert len(result.sites) == 1, [hit.words for hit in result.attentions]
    assert_close(out, model(*inputs))


def _grouped(scored: str, weighed: str, split: tuple[bool, bool]) -> Model:
    """Grouped heads by einsum, their number read from the inputs. split: whether keys, values have groups too."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        groups = q.shape[1] // 2
        wide = q.unflatten(1, (groups, q.shape[1] // groups))
        k, v = (x.unflatten(1, (groups, q.shape[1] // groups)) if s else x for x, s in zip((k, v), split))
        return torch.einsum(weighed, _causal(torch.einsum(scored, wide, k) * 0.25).softmax(-1), v)

    return attention


GROUPED: dict[str, tuple[Model, tuple[int, ...]]] = {
    "a key head a group": (_grouped("bgrid,bgjd->bgrij", "bgrij,bgjd->bgrid", (False, False)), (2, 3, N, 16)),
    "length before heads": (_grouped("bgrid,bgjd->bgrij", "bgrij,bgjd->bigrd", (False, False)), (2, 3, N, 16)),
    "every head its own": (_grouped("bgrid,bgrjd->bgrij", "bgrij,bgrjd->bgrid", (True, True)), (2, 6, N, 16)),
    "one key head for all": (_grouped("bgrid,bjd->bgrij", "bgrij,bjd->bgrid", (False, False)), (2, N, 16)),
}


@pytest.mark.parametrize("name", GROUPED)
def test_groups_of_a_size_that_only_a_run_knows(name: str) -> None:
    """Of the two sizes that the heads are split into only one can be inferred."""
    attention, shape = GROUPED[name]
    given = randn(2, 6, N, 16, seed=1), randn(*shape, seed=2), randn(*shape, seed=3)
    rewrite, out = rewritten(attention, given, dynamic=True)
    assert len(rewrite.sites) == 1, [hit.words for hit in rewrite.attentions]
    assert_close(out, attention(*given))


def test_queries_keys_and_values_keep_their_native_heads() -> None:
    model, inputs = SPELLINGS["grouped heads"]
    result, _ = rewritten(model, inputs)
    (site,) = result.sites
    assert [tuple(x.meta["example_value"].shape[:2]) for x in (site.q, site.k, site.v)] == [(2, 4), (2, 2), (2, 2)]  # type: ignore[union-attr]


REFUSED: dict[str, tuple[Model, Reason]] = {
    "hidden at -1000": (
        lambda q, k, v: _product(q, k).masked_fill(torch.ones(N, N).triu(1) > 0, -1e3).softmax(-1) @ v,
        Reason.FAINT,
    ),
    "hidden at -1000 beside large scores": (
        lambda q, k, v: (_product(q, k) * 400 - 1e3 * torch.ones(N, N).triu(1)).softmax(-1) @ v,
        Reason.FAINT,
    ),
    "a mask plus a little": (
        lambda q, k, v: (_product(q, k) + (torch.ones(N, N).tril() + 1e-9).log()).softmax(-1) @ v,
        Reason.FAINT,
    ),
    "keys not last": (
        lambda q, k, v: torch.einsum("bhji,bhjd->bhid", torch.einsum("bhid,bhjd->bhji", q, k).softmax(2), v),
        Reason.SHAPE,
    ),
    "relu hides nothing": (lambda q, k, v: F.relu(_causal(_product(q, k))).softmax(-1) @ v, Reason.BIDIRECTIONAL),
    "a function of scores without a reader": (
        lambda q, k, v: _causal(F.gelu(_product(q, k))).softmax(-1) @ v,
        Reason.MASK,
    ),
    "exponentials over more than their sum": (
        lambda q, k, v: ((e := torch.exp(_causal(_product(q, k)))) / (e.sum(-1, keepdim=True) + 1.0)) @ v,
        Reason.SHAPE,
    ),
    "exponentials divided behind the values": (
        lambda q, k, v: ((e := torch.exp(_causal(_product(q, k)))) @ v) / e.sum(-1, keepdim=True),
        Reason.SHAPE,
    ),
    "weights turned": (
        lambda q, k, v: (v.mT @ _causal(_product(q, k)).softmax(-1).mT).mT,
        Reason.SHAPE,
    ),
    "two products": (lambda q, k, v: _causal(_product(q, k) + _product(k, q)).softmax(-1) @ v, Reason.SHAPE),
    "weights scaled": (lambda q, k, v: (_causal(_product(q, k)).softmax(-1) * 2) @ v, Reason.ESCAPES),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name: str) -> None:
    model, reason = REFUSED[name]
    result, out = rewritten(model, QKV)
    assert [h.reason for h in result.attentions if isinstance(h, Rejected)] == [reason]
    assert_close(out, model(*QKV))


@pytest.mark.parametrize("mask_dtype", [torch.float32])
def test_a_float_key_padding_mask_of_multi_head_attention_is_added(mask_dtype: torch.dtype) -> None:
    module = torch.nn.MultiheadAttention(32, 2, batch_first=True).eval().requires_grad_(False)
    hidden = torch.full((N, N), -torch.inf).triu(1).to(mask_dtype)

    def model(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return module(x, x, x, attn_mask=hidden, key_padding_mask=padding, need_weights=False)[0]

    inputs = (randn(2, N, 32), randn(2, N, seed=3))
    result, out = rewritten(model, inputs)
    assert len(result.sites) == 1
    assert_close(out, model(*inputs))
