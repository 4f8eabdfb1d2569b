"""Music models, with relative positions that are shifted into place, and protein models."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from stem_compile.reasons import Reason
from tests.published_modules.gpt import Projected
from tests.published_modules.published import DIM, HEADS, WIDTH, N, merge, padded, published, rotated


@published("jason9693/MusicTransformer-pytorch, relative shift")
class MusicTransformer(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.relative = nn.Parameter(torch.randn(HEADS, N, DIM))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        n = x.shape[1]
        shifted = self.skewed(torch.matmul(q, self.relative[:, -n:].transpose(-1, -2)))
        logits = (torch.matmul(q, k.transpose(-1, -2)) + shifted) / math.sqrt(DIM)
        logits = logits + torch.triu(torch.ones(n, n), diagonal=1) * -1e9
        return self.proj(merge(torch.matmul(F.softmax(logits, -1), v)))

    def skewed(self, x: torch.Tensor) -> torch.Tensor:
        """Columns by distance as columns by position."""
        b, h, n, m = x.shape
        return F.pad(x, (1, 0)).view(b, h, m + 1, n)[:, :, 1:]


@published("kimiyoung/transformer-xl, relative positions")
class TransformerXL(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.relative = nn.Linear(WIDTH, WIDTH, bias=False)
        self.u, self.v = (nn.Parameter(torch.randn(HEADS, 1, DIM)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        n = x.shape[1]
        angles = torch.arange(n - 1, -1, -1.0)[:, None] / 10000 ** (torch.arange(0, WIDTH, 2) / WIDTH)
        r = self.relative(torch.cat([angles.sin(), angles.cos()], -1)).view(n, HEADS, DIM)
        ac = torch.einsum("bhid,bhjd->bhij", q + self.u, k)
        bd = torch.einsum("bhid,jhd->bhij", q + self.v, r)
        bd = torch.cat([torch.zeros(*bd.shape[:3], 1), bd], dim=-1).view(*bd.shape[:2], n + 1, n)[:, :, 1:]
        score = (ac + bd) * DIM**-0.5
        score = score.float().masked_fill(torch.triu(torch.ones(n, n), 1).bool()[None, None], -float("inf"))
        return self.proj(merge(torch.einsum("bhij,bhjd->bhid", F.softmax(score, dim=-1), v)))


@published("facebookresearch/audiocraft, MusicGen")
class MusicGen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = self.in_proj(x).view(b, n, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
        positions = torch.arange(n)
        delta = positions.view(-1, 1) - positions.view(1, -1)
        valid = (delta >= 0) & (delta <= 100)
        mask = torch.where(valid, torch.zeros([]), torch.full([], float("-inf")))
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=0)
        return self.out_proj(out.transpose(1, 2).reshape(b, n, WIDTH))


@published("openai/jukebox, blocks that see the block before")
class Jukebox(Projected):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        block = torch.arange(x.shape[1]) // 20
        mask = (block[:, None] == block[None, :]) | (block[:, None] == block[None, :] + 1)
        mask = mask.tril()[None, None].float()
        w = torch.matmul(q * DIM**-0.25, (k * DIM**-0.25).transpose(-1, -2))
        w = w * mask - 1e9 * (1 - mask)
        return self.proj(merge(torch.matmul(F.softmax(w, dim=-1), v)))


@published("salesforce/progen")
class ProGen(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones((N, N), dtype=torch.bool)).view(1, 1, N, N))
        self.register_buffer("masked_bias", torch.tensor(-1e9))
        self.scale_attn = torch.sqrt(torch.tensor(DIM, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        w = torch.matmul(rotated(q), rotated(k).transpose(-1, -2)) / self.scale_attn
        causal = self.bias[:, :, k.size(-2) - q.size(-2) : k.size(-2), : k.size(-2)]
        w = torch.where(causal, w, self.masked_bias.to(w.dtype))
        return self.proj(merge(torch.matmul(nn.Softmax(dim=-1)(w).to(v.dtype), v)))


@published("lightonai/RITA")
class RITA(Projected):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        q, k, v = self.heads(x)
        mask = torch.tril(torch.ones(n, n)).view(1, 1, n, n).logical_not()
        att = (rotated(q) @ rotated(k).transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = F.softmax(att.masked_fill(mask[:, :, :n, :n], float("-inf")), dim=-1)
        return self.proj(merge(att @ v))


@published("facebookresearch/esm, ESM-2", inputs=padded, reason=Reason.BIDIRECTIONAL, causal=False)
class ESM2(Projected):
    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        weights = torch.matmul(rotated(q * DIM**-0.5), rotated(k).transpose(-1, -2))
        weights = weights.masked_fill((padding == 0)[:, None, None].to(torch.bool), float("-inf"))
        return self.proj(merge(torch.matmul(F.softmax(weights, dim=-1), v)))


@published("aqlaboratory/openfold, gated attention with a pair bias", reason=Reason.BIDIRECTIONAL, causal=False)
class Evoformer(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.pair = nn.Linear(WIDTH, WIDTH), nn.Linear(8, HEADS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        z = (x[:, :, None, :8] * x[:, None, :, :8]).tanh()
        bias = self.pair(z).permute(0, 3, 1, 2)
        a = torch.matmul(q * DIM**-0.5, k.transpose(-1, -2)) + bias
        out = merge(torch.matmul(torch.softmax(a, dim=-1), v))
        return self.proj(torch.sigmoid(self.gate(x)) * out)
