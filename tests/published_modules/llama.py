"""Llama and what came after it: rotary embeddings, grouped heads, caches, windows, softcaps."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.published_modules.published import DIM, HEADS, WIDTH, N, merge, published, rotated, split

KV_HEADS = 2


class Grouped(nn.Module):
    """Projections with fewer key heads than query heads."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wo = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk, self.wv = (nn.Linear(WIDTH, KV_HEADS * DIM, bias=False) for _ in range(2))

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return split(self.wq(x)), split(self.wk(x), KV_HEADS), split(self.wv(x), KV_HEADS)


def repeat_kv(x: torch.Tensor, times: int) -> torch.Tensor:
    """[B, N, heads, d] with every head ``times`` times."""
    b, n, heads, d = x.shape
    return x[:, :, :, None, :].expand(b, n, heads, times, d).reshape(b, n, heads * times, d)


@published("facebookresearch/llama, complex rotary embedding")
class Llama(Grouped):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        xq, xk, xv = (w(x).view(b, n, -1, DIM) for w in (self.wq, self.wk, self.wv))
        xq, xk = self.turn(xq), self.turn(xk)
        keys, values = (repeat_kv(y, HEADS // KV_HEADS).transpose(1, 2) for y in (xk, xv))
        mask = torch.triu(torch.full((n, n), float("-inf")), diagonal=1)
        scores = torch.matmul(xq.transpose(1, 2), keys.transpose(2, 3)) / math.sqrt(DIM)
        scores = F.softmax((scores + mask).float(), dim=-1).type_as(xq)
        return self.wo(torch.matmul(scores, values).transpose(1, 2).contiguous().view(b, n, -1))

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """Pairs as complex numbers, turned by their position."""
        freqs = torch.outer(torch.arange(x.shape[1]).float(), 10000.0 ** -(torch.arange(0, DIM, 2) / DIM))
        turns = torch.stack([freqs.cos(), freqs.sin()], -1)[None, :, None]
        a, b = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)
        cos, sin = turns.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(3).type_as(x)


@published("meta-llama/llama3, prefill into a cache")
class Llama3(Grouped):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache_k", torch.zeros(4, 2 * N, KV_HEADS, DIM))
        self.register_buffer("cache_v", torch.zeros(4, 2 * N, KV_HEADS, DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        start = 0
        xq, xk, xv = (w(x).view(b, n, -1, DIM) for w in (self.wq, self.wk, self.wv))
        self.cache_k[:b, start : start + n] = xk
        self.cache_v[:b, start : start + n] = xv
        keys, values = (
            repeat_kv(c[:b, : start + n], HEADS // KV_HEADS).transpose(1, 2) for c in (self.cache_k, self.cache_v)
        )
        mask = torch.triu(torch.full((n, n), float("-inf")), diagonal=1)
        mask = torch.hstack([torch.zeros((n, start)), mask]).type_as(x)
        scores = torch.matmul(xq.transpose(1, 2), keys.transpose(2, 3)) / math.sqrt(DIM) + mask
        out = torch.matmul(F.softmax(scores.float(), dim=-1).type_as(xq), values)
        return self.wo(out.transpose(1, 2).contiguous().view(b, n, -1))


@published("Lightning-AI/lit-llama, a mask cut from a buffer")
class LitLlama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        q, k, v = (split(y) for y in self.c_attn(x).split(WIDTH, dim=2))
        mask = torch.tril(torch.ones((256, 256), dtype=torch.bool))[None, None][:, :, :n, :n]
        y = F.scaled_dot_product_attention(rotated(q), rotated(k), v, attn_mask=mask, dropout_p=0.0)
        return self.c_proj(y.transpose(1, 2).contiguous().view(*x.shape))


@published("pytorch-labs/gpt-fast, rows of a mask by position")
class GPTFast(Grouped):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k_cache", torch.zeros(2, KV_HEADS, N, DIM))
        self.register_buffer("v_cache", torch.zeros(2, KV_HEADS, N, DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        input_pos = torch.arange(x.shape[1])
        causal_mask = torch.tril(torch.ones(N, N, dtype=torch.bool))
        mask = causal_mask[None, None, input_pos]
        q, k, v = self.heads(x)
        k_out, v_out = self.k_cache, self.v_cache
        k_out[:, :, input_pos] = k
        v_out[:, :, input_pos] = v
        k, v = (y.repeat_interleave(HEADS // KV_HEADS, dim=1) for y in (k_out, v_out))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
        return self.wo(merge(y))


@published("mistralai/mistral-src, a window by the logarithm of triangles")
class Mistral(Grouped):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, window = x.shape[1], 48
        mask = torch.tril(torch.full((n, n), fill_value=1.0), diagonal=0).to(x.dtype)
        mask = torch.log(torch.triu(mask, diagonal=-window))
        q, k, v = self.heads(x)
        k, v = (torch.repeat_interleave(y, repeats=HEADS // KV_HEADS, dim=1) for y in (k, v))
        scores = torch.matmul(rotated(q), rotated(k).transpose(2, 3)) / math.sqrt(DIM) + mask[None, None]
        return self.wo(merge(torch.matmul(nn.functional.softmax(scores.float(), dim=-1).type_as(q), v)))


@published("google/gemma_pytorch, a window and a softcap")
class Gemma2(Grouped):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        mask = torch.triu(torch.full((1, 1, n, n), -2.3819763e38), diagonal=1)
        sliding = torch.triu(torch.ones_like(mask), -1 * 64 + 1) * torch.tril(torch.ones_like(mask), 64 - 1)
        mask = torch.where(sliding == 1, mask, -2.3819763e38)
        q, k, v = self.heads(x)
        k, v = (torch.repeat_interleave(y, 2, dim=1) for y in (k, v))
        scores = torch.matmul(q * DIM**-0.5, k.transpose(2, 3))
        scores = torch.tanh(scores / 50.0) * 50.0 + mask
        return self.wo(merge(torch.matmul(F.softmax(scores.float(), dim=-1).type_as(q), v)))


@published("QwenLM/Qwen, queries scaled by the logarithm of the length")
class Qwen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("logn", torch.tensor([math.log(i, 64) if i > 64 else 1 for i in range(1, 2 * N)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        q, k, v = (y.view(*x.shape[:2], HEADS, DIM) for y in self.c_attn(x).split(WIDTH, dim=2))
        q = q * self.logn[None, :n, None, None].type_as(q)
        causal = torch.tril(torch.ones((n, n), dtype=torch.bool)).view(1, 1, n, n)
        q, k, v = (y.permute(0, 2, 1, 3) for y in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=causal[:, :, : q.size(-2), k.size(-2) - n : k.size(-2)])
        return self.c_proj(out.transpose(1, 2).reshape(*x.shape))


@published("deepseek-ai/DeepSeek-V2, latent keys and values")
class MultiHeadLatent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.down, self.o = nn.Linear(WIDTH, HEADS * 24), nn.Linear(WIDTH, 16 + 8), nn.Linear(HEADS * 16, WIDTH)
        self.up = nn.Linear(16, HEADS * (16 + 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q_nope, q_pe = self.q(x).view(b, n, HEADS, 24).transpose(1, 2).split([16, 8], dim=-1)
        compressed, k_pe = self.down(x).split([16, 8], dim=-1)
        k_nope, v = self.up(compressed).view(b, n, HEADS, 32).transpose(1, 2).split([16, 16], dim=-1)
        q_pe, k_pe = rotated(q_pe), rotated(k_pe.view(b, n, 1, 8).transpose(1, 2))
        q, k = k_pe.new_empty(b, HEADS, n, 24), k_pe.new_empty(b, HEADS, n, 24)
        q[..., :16], q[..., 16:] = q_nope, q_pe
        k[..., :16], k[..., 16:] = k_nope, k_pe
        weights = torch.matmul(q, k.transpose(2, 3)) * 24**-0.5 + torch.full((n, n), torch.finfo(x.dtype).min).triu(1)
        return self.o(merge(torch.matmul(F.softmax(weights, dim=-1, dtype=torch.float32), v)))


@published("openai/gpt-oss, a learned sink")
class GptOss(Grouped):
    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        per = HEADS // KV_HEADS
        q = self.wq(x).view(b, n, KV_HEADS, per, DIM)[0]
        k, v = (w(x).view(b, n, KV_HEADS, DIM)[0] for w in (self.wk, self.wv))
        k, v = (y[:, :, None, :].expand(-1, -1, per, -1) for y in (k, v))
        sinks = self.sinks.reshape(KV_HEADS, per, 1, 1).expand(-1, -1, n, -1)
        mask = torch.triu(q.new_full((n, n), -float("inf")), diagonal=1)
        mask = mask + torch.tril(mask.new_full((n, n), -float("inf")), diagonal=-64)
        scores = torch.einsum("qhmd,khmd->hmqk", q, k) * DIM**-0.5 + mask[None, None]
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
        return self.wo(torch.einsum("hmqk,khmd->qhmd", weights, v).reshape(n, -1))
