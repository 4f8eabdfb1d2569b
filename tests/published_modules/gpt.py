"""Language models of the GPT family."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tests.published_modules.published import (
    BATCH,
    DIM,
    HEADS,
    WIDTH,
    N,
    merge,
    padded,
    published,
    rotated,
    slopes,
    split,
)


class Projected(nn.Module):
    """Queries, keys and values of one layer, and the projection after."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = (split(y) for y in self.qkv(x).split(WIDTH, dim=2))
        return q, k, v


@published("karpathy/nanoGPT")
class NanoGPT(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(256, 256)).view(1, 1, 256, 256))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        q, k, v = self.heads(x)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :n, :n] == 0, float("-inf"))
        return self.proj(merge(self.dropout(F.softmax(att, dim=-1)) @ v))


@published("karpathy/nanoGPT, flash")
class NanoGPTFlash(Projected):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=None, dropout_p=0.1 if self.training else 0, is_causal=True
        )
        return self.proj(merge(y))


@published("karpathy/minGPT")
class MinGPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.register_buffer("mask", torch.tril(torch.ones(N, N)).view(1, 1, N, N))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.size()
        k, q, v = (
            layer(x).view(b, n, HEADS, c // HEADS).transpose(1, 2) for layer in (self.key, self.query, self.value)
        )
        att = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        att = F.softmax(att.masked_fill(self.mask[:, :, :n, :n] == 0, -1e10), dim=-1)
        return self.proj((att @ v).transpose(1, 2).contiguous().view(b, n, c))


@published("karpathy/ng-video-lecture")
class LectureHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, DIM, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(N, N)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, k, q = x.shape[1], self.key(x), self.query(x)
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        wei = wei.masked_fill(self.tril[:n, :n] == 0, float("-inf"))
        return F.softmax(wei, dim=-1) @ self.value(x)


@published("openai/gpt-2")
class GPT2(Projected):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        w = torch.matmul(q, k.transpose(-1, -2)) * (v.shape[-1] ** -0.5)
        nd, ns = w.shape[-2], w.shape[-1]
        i, j = torch.arange(nd)[:, None], torch.arange(ns)
        b = (i >= j - ns + nd).to(w.dtype).reshape(1, 1, nd, ns)
        w = w * b - 1e10 * (1 - b)
        w = torch.exp(w - w.max(dim=-1, keepdim=True).values)
        return self.proj(merge((w / w.sum(dim=-1, keepdim=True)) @ v))


@published("huggingface/transformers, GPT-2", inputs=padded)
class GPT2WithPadding(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(N, N, dtype=torch.bool)).view(1, 1, N, N))

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        w = torch.matmul(q, k.transpose(-1, -2)) / torch.full([], v.size(-1) ** 0.5)
        rows, keys = q.size(-2), k.size(-2)
        causal = self.bias[:, :, keys - rows : keys, :keys]
        w = torch.where(causal, w, torch.full([], torch.finfo(w.dtype).min))
        w = w + (1.0 - attention_mask[:, None, None, :].to(w.dtype)) * torch.finfo(w.dtype).min
        return self.proj(merge(F.softmax(w, dim=-1).type(v.dtype) @ v))


@published("openai/finetune-transformer-lm")
class OpenAIGPT(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("b", torch.tril(torch.ones(N, N)).view(1, 1, N, N))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        w = torch.matmul(q, k.permute(0, 1, 3, 2)) / math.sqrt(v.size(-1))
        b = self.b[:, :, : w.size(-2), : w.size(-1)]
        return self.proj(merge(nn.Softmax(dim=-1)(w * b + -1e4 * (1 - b)) @ v))


@published("EleutherAI/gpt-neo, local layer")
class GPTNeoLocal(Projected):
    def __init__(self) -> None:
        super().__init__()
        bias = torch.tril(torch.ones(N, N, dtype=torch.bool))
        self.register_buffer("bias", torch.bitwise_xor(bias, torch.tril(bias, -32)).view(1, 1, N, N))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        w = torch.matmul(q.to(torch.float32), k.to(torch.float32).transpose(-1, -2))
        w = torch.where(self.bias[:, :, : q.size(-2), : k.size(-2)], w, torch.tensor(torch.finfo(w.dtype).min))
        return self.proj(merge(nn.functional.softmax(w, dim=-1).to(v.dtype) @ v))


@published("kingoflolz/mesh-transformer-jax, GPT-J")
class GPTJ(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x).view(BATCH, -1, HEADS, DIM) for layer in (self.q, self.k, self.v))
        q, k = (self.turn(y).permute(0, 2, 1, 3).float() for y in (q, k))
        scores = torch.matmul(q, k.transpose(-1, -2))
        n = x.shape[1]
        mask = torch.tril(torch.ones((n, n), dtype=torch.bool))[None, None]
        scores = torch.where(mask, scores, torch.finfo(scores.dtype).min) / torch.sqrt(torch.tensor(float(DIM)))
        out = F.softmax(scores, dim=-1).to(v.dtype) @ v.permute(0, 2, 1, 3)
        return self.o(out.permute(0, 2, 1, 3).contiguous().view(BATCH, n, WIDTH))

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of pairs that lie side by side."""
        angles = torch.einsum("i,j->ij", torch.arange(x.shape[1]).float(), 1 / 10000 ** (torch.arange(0, DIM, 2) / DIM))
        sin, cos = (y.repeat_interleave(2, -1)[None, :, None, :] for y in (angles.sin(), angles.cos()))
        other = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
        return x * cos + other * sin


@published("EleutherAI/gpt-neox", inputs=padded)
class GPTNeoX(Projected):
    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, HEADS, 3 * DIM).permute(0, 2, 1, 3)
        q, k, v = qkv.chunk(3, dim=-1)
        q, k = rotated(q), rotated(k)
        scores = torch.baddbmm(
            torch.zeros(b * HEADS, n, n),
            q.reshape(b * HEADS, n, DIM),
            k.reshape(b * HEADS, n, DIM).transpose(1, 2),
            beta=1.0,
            alpha=1 / math.sqrt(DIM),
        ).view(b, HEADS, n, n)
        mask = torch.tril(torch.ones(n, n, dtype=torch.bool)) & attention_mask[:, None, None, :].bool()
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return self.proj(merge(torch.matmul(F.softmax(scores, -1), v)))


@published("huggingface/transformers, CodeGen")
class CodeGen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("causal_mask", torch.tril(torch.ones(N, N, dtype=torch.bool)).view(1, 1, N, N))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(x).reshape(*x.shape[:2], 2, -1)
        q, v, k = (
            y.reshape(*x.shape[:2], HEADS, DIM).permute(0, 2, 1, 3) for y in torch.split(parts, WIDTH // 2, dim=-1)
        )
        w = torch.matmul(q.float(), k.float().transpose(-1, -2)) / math.sqrt(DIM)
        w = torch.where(self.causal_mask[:, :, : q.size(-2), : k.size(-2)], w, torch.finfo(w.dtype).min)
        return self.out(merge(nn.Softmax(dim=-1)(w) @ v))


@published("bigscience-workshop/Megatron-DeepSpeed, BLOOM", inputs=padded)
class Bloom(Projected):
    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        fused = self.qkv(x).view(b, n, HEADS, 3, DIM)
        q, k, v = (fused[..., i, :].transpose(1, 2).reshape(b * HEADS, n, DIM) for i in range(3))
        positions = ((attention_mask.cumsum(dim=-1) - 1) * attention_mask)[:, None, :]
        alibi = (slopes()[..., None] * positions).reshape(b * HEADS, 1, n)
        scores = alibi.baddbmm(batch1=q, batch2=k.transpose(-1, -2), beta=1.0, alpha=DIM**-0.5).view(b, HEADS, n, n)
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)[None, None] | (attention_mask == 0)[:, None, None, :]
        scores = torch.masked_fill(scores, hidden, torch.finfo(scores.dtype).min)
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).view(b * HEADS, n, n)
        return self.proj(merge(torch.bmm(weights, v).view(b, HEADS, n, DIM)))


@published("facebookresearch/metaseq, OPT", inputs=padded)
class OPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        lowest = torch.finfo(x.dtype).min
        mask = torch.full((n, n), lowest)
        mask = mask.masked_fill(torch.arange(n) < (torch.arange(n) + 1).view(n, 1), 0)[None, None].expand(b, 1, n, n)
        inverted = 1.0 - attention_mask[:, None, None, :].expand(b, 1, n, n).to(x.dtype)
        mask = mask + inverted.masked_fill(inverted.to(torch.bool), lowest)
        q = self.q(x) * DIM**-0.5
        q, k, v = (split(y).contiguous().view(b * HEADS, n, DIM) for y in (q, self.k(x), self.v(x)))
        scores = torch.bmm(q, k.transpose(1, 2)).view(b, HEADS, n, n) + mask
        scores = torch.max(scores, torch.tensor(lowest)).view(b * HEADS, n, n)
        out = torch.bmm(F.softmax(scores, dim=-1), v).view(b, HEADS, n, DIM)
        return self.o(merge(out))


@published("mosaicml/llm-foundry, MPT")
class MPT(Projected):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        qkv = self.qkv(x).clamp(min=-8.0, max=8.0)
        q, k, v = (split(y) for y in qkv.chunk(3, dim=2))
        bias = torch.arange(1 - n, 1).view(1, 1, 1, n) * slopes().view(1, HEADS, 1, 1)
        scores = q.matmul(k.transpose(-1, -2)) * DIM**-0.5
        scores = scores + bias[:, :, -scores.size(2) :, -scores.size(3) :]
        causal = (~torch.ones(n, n, dtype=torch.bool).tril()).view(1, 1, n, n)
        scores = scores.masked_fill(causal, torch.finfo(q.dtype).min)
        return self.proj(merge(torch.softmax(scores, dim=-1) @ v))


@published("tiiuae/falcon, multi-query with ALiBi", inputs=padded)
class Falcon(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.dense = nn.Linear(WIDTH, WIDTH + 2 * DIM, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        fused = self.qkv(x).view(b, n, HEADS + 2, DIM)
        q, k, v = (y.transpose(1, 2) for y in (fused[..., :-2, :], fused[..., [-2], :], fused[..., [-1], :]))
        positions = ((attention_mask.cumsum(dim=-1) - 1) * attention_mask)[:, None, :]
        alibi = (slopes().bfloat16()[..., None] * positions).reshape(b, HEADS, 1, n).to(x.dtype)
        lowest = torch.finfo(x.dtype).min
        mask = torch.where(
            torch.ones(n, n, dtype=torch.bool).tril() & attention_mask[:, None, None].bool(), 0.0, lowest
        )
        scores = q @ k.transpose(-1, -2)
        weights = F.softmax((scores + alibi) * (1 / math.sqrt(DIM)) + mask, dim=-1, dtype=x.dtype)
        return self.dense(merge(weights @ v))


@published("bigcode-project/Megatron-LM, StarCoder with one key head")
class StarCoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, WIDTH + 2 * DIM), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, kv = self.qkv(x).split((WIDTH, 2 * DIM), dim=2)
        k, v = (y.unsqueeze(1) for y in kv.split(DIM, dim=-1))
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        out = F.scaled_dot_product_attention(split(q), k.expand(-1, HEADS, -1, -1), v.expand(-1, HEADS, -1, -1), causal)
        return self.proj(merge(out))


@published("Stability-AI/StableLM, a part of each head rotated")
class StableLM(Projected):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        q, k = (torch.cat([rotated(y[..., : DIM // 2]), y[..., DIM // 2 :]], -1) for y in (q, k))
        mask = torch.triu(torch.full((x.shape[1], x.shape[1]), torch.finfo(x.dtype).min), diagonal=1)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(DIM) + mask[None, None]
        return self.proj(merge(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v))


@published("harvardnlp/annotated-transformer")
class AnnotatedTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.size(1)
        mask = (torch.triu(torch.ones((1, n, n)), diagonal=1).type(torch.uint8) == 0).unsqueeze(1)
        q, k, v = (lin(x).view(x.size(0), -1, HEADS, DIM).transpose(1, 2) for lin, _ in zip(self.linears, range(3)))
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
        p_attn = scores.masked_fill(mask == 0, -1e9).softmax(dim=-1)
        out = torch.matmul(p_attn, v).transpose(1, 2).contiguous().view(x.size(0), -1, WIDTH)
        return self.linears[-1](out)


@published("pbloem/former")
class Former(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.keys, self.queries, self.values, self.unify = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, _ = x.size()
        k, q, v = (layer(x).view(b, t, HEADS, DIM) for layer in (self.keys, self.queries, self.values))
        k, q, v = (y.transpose(1, 2).contiguous().view(b * HEADS, t, DIM) for y in (k, q, v))
        dot = torch.bmm(q / DIM**0.25, (k / DIM**0.25).transpose(1, 2))
        dot = dot + torch.full((t, t), float("-inf")).triu(1)
        out = torch.bmm(F.softmax(dot, dim=2), v).view(b, HEADS, t, DIM)
        return self.unify(out.transpose(1, 2).contiguous().view(b, t, WIDTH))


@published("facebookresearch/fairseq, a decoder's self-attention")
class Fairseq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(0, 1)
        n, b, _ = x.shape
        q, k, v = self.q(x) * DIM**-0.5, self.k(x), self.v(x)
        q, k, v = (y.contiguous().view(n, b * HEADS, DIM).transpose(0, 1) for y in (q, k, v))
        weights = torch.bmm(q, k.transpose(1, 2))
        weights += torch.triu(torch.zeros(n, n).float().fill_(float("-inf")), 1).unsqueeze(0)
        probs = F.softmax(weights, dim=-1, dtype=torch.float32).type_as(weights)
        out = torch.bmm(F.dropout(probs, 0.1, training=self.training), v)
        return self.out(out.transpose(0, 1).contiguous().view(n, b, WIDTH)).transpose(0, 1)


@published("tensorflow/tensor2tensor, in PyTorch ports")
class Tensor2Tensor(Projected):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        n = x.shape[1]
        bias = -1e9 * (1.0 - torch.tril(torch.ones(n, n))).reshape(1, 1, n, n)
        logits = torch.matmul(q * DIM**-0.5, k.transpose(-1, -2))
        logits = logits + bias
        return self.proj(merge(torch.matmul(torch.softmax(logits, -1), v)))


@published("google-research/bert used as a decoder, UniLM", inputs=padded)
class UniLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(x.shape[1])
        causal = ids[None, None, :].repeat(x.shape[0], x.shape[1], 1) <= ids[None, :, None]
        extended = causal[:, None, :, :].to(x.dtype) * attention_mask[:, None, None, :]
        extended = (1.0 - extended) * -10000.0
        q, k, v = (
            layer(x).view(*x.shape[:2], HEADS, DIM).permute(0, 2, 1, 3) for layer in (self.query, self.key, self.value)
        )
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(DIM) + extended
        context = torch.matmul(nn.Softmax(dim=-1)(scores), v)
        return context.permute(0, 2, 1, 3).contiguous().view(*x.shape)


@published("salesforce/ctrl")
class CTRL(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.dense = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        mask = torch.triu(torch.ones(n + 40, n + 40), 1)
        q, k, v = (w(x).reshape(b, -1, HEADS, DIM).permute([0, 2, 1, 3]) for w in (self.wq, self.wk, self.wv))
        logits = torch.matmul(q, k.permute(0, 1, 3, 2)) / math.sqrt(DIM)
        nd, ns = logits.size(-2), logits.size(-1)
        logits += mask[ns - nd : ns, :ns] * -1e4
        out = torch.matmul(torch.softmax(logits, dim=-1), v).permute([0, 2, 1, 3])
        return self.dense(out.reshape(b, -1, WIDTH))


@published("NVIDIA/Megatron-LM")
class Megatron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.dense = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(0, 1)
        n, b, _ = x.shape
        q, k, v = self.qkv(x).view(n, b, HEADS, 3 * DIM).chunk(3, dim=-1)
        q, k, v = (y.reshape(n, b * HEADS, DIM) for y in (q, k, v))
        mask = torch.tril(torch.ones((b, n, n))).view(b, 1, n, n) < 0.5
        buffer = torch.empty(b * HEADS, n, n)
        scores = torch.baddbmm(buffer, q.transpose(0, 1), k.transpose(0, 1).transpose(1, 2), beta=0.0, alpha=DIM**-0.5)
        scores = scores.view(b, HEADS, n, n).masked_fill_(mask, -10000.0)
        probs = nn.Softmax(dim=-1)(scores).view(b * HEADS, n, n)
        context = torch.bmm(probs, v.transpose(0, 1)).view(b, HEADS, n, DIM).permute(2, 0, 1, 3).contiguous()
        return self.dense(context.view(n, b, WIDTH)).transpose(0, 1)


@published("google-research/text-to-text-transfer-transformer, a decoder")
class T5Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.bias = nn.Embedding(32, HEADS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        relative = -torch.min(torch.arange(n)[None, :] - torch.arange(n)[:, None], torch.zeros(n, n, dtype=torch.long))
        large = 16 + (torch.log(relative.float() / 16) / math.log(128 / 16) * 16).to(torch.long)
        buckets = torch.where(relative < 16, relative, torch.min(large, torch.full_like(large, 31)))
        bias = self.bias(buckets).permute([2, 0, 1]).unsqueeze(0)
        causal = (torch.arange(n)[None, None, :].repeat(1, n, 1) <= torch.arange(n)[None, :, None]).to(x.dtype)
        bias = bias + (1.0 - causal[:, None]) * torch.finfo(x.dtype).min
        scores = torch.matmul(split(self.q(x)), split(self.k(x)).transpose(3, 2))
        scores += bias
        return self.o(merge(torch.matmul(F.softmax(scores.float(), dim=-1).type_as(scores), split(self.v(x)))))


@published("facebookresearch/fairseq, BART's decoder in transformers", inputs=padded)
class BartDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        mask = torch.full((n, n), torch.finfo(x.dtype).min)
        cond = torch.arange(mask.size(-1))
        mask.masked_fill_(cond < (cond + 1).view(mask.size(-1), 1), 0)
        expanded = attention_mask[:, None, None, :].expand(b, 1, n, n).to(x.dtype)
        mask = mask[None, None].masked_fill((1.0 - expanded).bool(), torch.finfo(x.dtype).min)
        scores = torch.matmul(split(self.q(x)) * DIM**-0.5, split(self.k(x)).transpose(2, 3)) + mask
        return self.out(merge(torch.matmul(scores.softmax(-1), split(self.v(x)))))


@published("baichuan-inc/Baichuan-13B, ALiBi in the mask")
class Baichuan(Projected):
    def __init__(self) -> None:
        super().__init__()
        alibi = slopes().unsqueeze(1).unsqueeze(1) * torch.arange(N).unsqueeze(0).unsqueeze(0).expand(HEADS, -1, -1)
        self.register_buffer("future_mask", torch.triu(torch.full((N, N), float("-inf")), 1)[None] + alibi)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        n = x.shape[1]
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(DIM) + self.future_mask[:HEADS, :n, :n]
        scores = torch.max(scores, torch.tensor(torch.finfo(scores.dtype).min))
        return self.proj(merge(torch.matmul(F.softmax(scores, dim=-1), v)))


@published("THUDM/ChatGLM2-6B")
class ChatGLM2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.dense = nn.Linear(WIDTH, WIDTH + 2 * 2 * DIM), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(0, 1)
        n, b, _ = x.shape
        q, k, v = self.qkv(x).split([WIDTH, 2 * DIM, 2 * DIM], dim=-1)
        q, k, v = q.view(n, b, HEADS, DIM), k.view(n, b, 2, DIM), v.view(n, b, 2, DIM)
        k, v = (y.unsqueeze(-2).expand(-1, -1, -1, HEADS // 2, -1).contiguous().view(n, b, HEADS, DIM) for y in (k, v))
        q, k, v = (y.permute(1, 2, 0, 3) for y in (q, k, v))
        context = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dense(context.permute(2, 0, 1, 3).reshape(n, b, WIDTH)).transpose(0, 1)


@published("kzl/decision-transformer")
class DecisionTransformer(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones((N, N), dtype=torch.uint8)).view(1, 1, N, N))
        self.register_buffer("masked_bias", torch.tensor(-1e4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        w = torch.matmul(q, k.transpose(-1, -2)) / (float(v.size(-1)) ** 0.5)
        nd, ns = w.size(-2), w.size(-1)
        mask = self.bias[:, :, ns - nd : ns, :ns]
        w = torch.where(mask.bool(), w, self.masked_bias.to(w.dtype))
        return self.proj(merge(torch.matmul(nn.Softmax(dim=-1)(w), v)))


@published("persimmon-ai-labs/adept-inference, normalised queries and keys")
class Persimmon(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.LayerNorm(DIM), nn.LayerNorm(DIM)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = (self.qkv(x).view(b, n, HEADS, 3, DIM)[..., i, :] for i in range(3))
        q, k = (rotated(norm(y).transpose(1, 2)) for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        mask = torch.where(torch.ones(n, n).tril().bool(), 0.0, torch.finfo(x.dtype).min)[None, None]
        weights = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(DIM) + mask
        out = torch.matmul(F.softmax(weights, dtype=torch.float32, dim=-1).to(q.dtype), v.transpose(1, 2))
        return self.proj(merge(out))


@published("huggingface/transformers, Cohere: attention and feed-forward in parallel")
class Cohere(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        q, k, v = self.heads(y)
        out = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        return x + self.proj(merge(out)) + self.down(F.silu(self.up(y)))


@published("huggingface/transformers, OpenAI GPT", inputs=padded)
class OpenAIGPTWithPadding(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(256, 256)).view(1, 1, 256, 256))

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        w = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(v.size(-1))
        b = self.bias[:, :, : w.size(-2), : w.size(-1)]
        w = w * b + -1e4 * (1 - b)
        w = w + (1.0 - attention_mask[:, None, None, :].to(w.dtype)) * torch.finfo(w.dtype).min
        return self.proj(merge(torch.matmul(nn.functional.softmax(w, dim=-1), v)))
