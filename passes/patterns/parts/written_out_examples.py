"""What ``written_out`` must match, and what it must not: read them as its specification."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from stem_compile.reasons import Reason


def _qkv(heads: int = 4, kv_heads: int = 4, n: int = 70) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, h, n, 16) for h in (heads, kv_heads, kv_heads))


def _causal(n: int, value_: float = -torch.inf) -> torch.Tensor:
    return torch.full((n, n), value_).triu(1)


def examples() -> dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]]:
    """Name -> (function, inputs) that must match."""
    return _spellings() | _scores()


def _spellings() -> dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]]:
    """Products, masks and shapes written in several ways."""

    def added(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(q.shape[2])
        mask = torch.where(rows[None, :] <= rows[:, None], 0.0, torch.finfo(q.dtype).min)
        weights = F.softmax(torch.matmul(q, k.transpose(2, 3)) * 0.25 + mask, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(F.dropout(weights, p=0.0, training=False), v)

    def filled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(q.shape[2])
        scores = (q / math.sqrt(q.shape[-1])) @ k.mT
        return scores.masked_fill(rows[None, :] > rows[:, None], -torch.inf).softmax(-1) @ v

    def einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4.0 + _causal(q.shape[1])
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)

    def three_dimensions(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        b, h, n, d = q.shape
        q, k, v = (x.reshape(b * h, n, d) for x in (q, k, v))
        scores = torch.baddbmm(torch.zeros(b * h, n, n), q, k.transpose(1, 2), beta=1.0, alpha=0.25).view(
            b, h, n, n
        ) + _causal(n)
        return torch.bmm(scores.softmax(-1).view(b * h, n, n), v).view(b, h, n, d)

    def in_place(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-1, -2)
        scores *= 0.25
        scores += _causal(q.shape[2])
        return scores.softmax(-1) @ v

    def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (
            x[:, :, None].expand(x.shape[0], 2, 2, x.shape[2], 16).reshape(x.shape[0], 4, x.shape[2], 16)
            for x in (k, v)
        )
        return added(q, k, v)

    return {
        "mask added": (added, _qkv()),
        "mask filled in": (filled, _qkv()),
        "einsum": (einsum, _qkv()),
        "baddbmm": (three_dimensions, _qkv()),
        "in place": (in_place, _qkv()),
        "grouped": (grouped, _qkv(4, 2)),
        "one head": (
            lambda q, k, v: (q @ k.t() + _causal(70)).softmax(-1) @ v,
            tuple(torch.randn(70, 16) for _ in range(3)),
        ),
    }


def _scores() -> dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]]:
    """Scores that are more than the scaled product."""

    def softcapped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.tanh(q @ k.transpose(-1, -2) * 0.25 / 30.0) * 30.0 + _causal(q.shape[2])
        return scores.softmax(-1) @ v

    def sinks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-1, -2) * 0.25 + _causal(q.shape[2])
        joined = torch.cat([scores, sink.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)], dim=-1)
        joined = joined - joined.max(dim=-1, keepdim=True).values
        return joined.softmax(-1)[..., :-1] @ v

    def alibi(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(q.shape[2])
        bias = slopes[:, None, None] * (rows[None, :] - rows[:, None])
        scores = q @ k.transpose(-1, -2) * 0.25 + bias
        return scores.masked_fill((rows[None, :] > rows[:, None]), torch.finfo(q.dtype).min).softmax(-1) @ v

    def buckets(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(q.shape[2])
        distance = (rows[:, None] - rows[None, :]).clamp(0, 15)
        bias = F.embedding(distance, table).permute(2, 0, 1).unsqueeze(0)
        return (q @ k.transpose(-1, -2) + bias + _causal(q.shape[2])).softmax(-1) @ v

    return {
        "softcap": (softcapped, _qkv()),
        "sinks": (sinks, (*_qkv(), torch.randn(4))),
        "alibi": (alibi, (*_qkv(), torch.tensor([0.5, 0.25, 0.1, 0.01]))),
        "a bias by distance": (buckets, (*_qkv(), torch.randn(16, 4))),
    }


def near_misses() -> dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], Reason]]:
    """Name -> (function, inputs, reason) that must be rejected, and why."""

    def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q @ k.transpose(-1, -2) * 0.25 + _causal(q.shape[2])

    def returned(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = scores(q, k).softmax(-1)
        return weights @ v, weights

    def scores_used(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = scores(q, k)
        return logits.softmax(-1) @ v, logits.sum()

    def changed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (scores(q, k).softmax(-1) * 0.5) @ v

    def overwritten(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = scores(q, k).softmax(-1)
        weights[:, :, 5] = 0
        return weights @ v

    def threshold(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        logits = scores(q, k)
        return logits.masked_fill(logits < -0.5, -torch.inf).softmax(-1) @ v

    def buckets(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(q.shape[2])
        return (
            q @ k.mT + F.embedding((rows[:, None] - rows[None, :]).abs().clamp(max=15), table).permute(2, 0, 1)
        ).softmax(-1) @ v

    return {
        "a learned bias and no mask": (buckets, (*_qkv(), torch.randn(16, 4)), Reason.BIDIRECTIONAL),
        "weights overwritten": (overwritten, _qkv(), Reason.ESCAPES),
        "keys chosen by their scores": (threshold, _qkv(), Reason.MASK),
        "weights returned": (returned, _qkv(), Reason.ESCAPES),
        "scores used elsewhere": (scores_used, _qkv(), Reason.ESCAPES),
        "weights changed": (changed, _qkv(), Reason.ESCAPES),
        "dropout": (lambda q, k, v: F.dropout(scores(q, k).softmax(-1), 0.5) @ v, _qkv(), Reason.DROPOUT),
        "bidirectional": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, _qkv(), Reason.BIDIRECTIONAL),
    }
