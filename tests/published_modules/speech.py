"""Speech models: encoders that see everything, decoders, and encoders that stream."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from stem_compile.reasons import Reason
from tests.published_modules.gpt import Projected
from tests.published_modules.published import DIM, HEADS, WIDTH, merge, padded, published, split


class Whisper(nn.Module):
    """Projections of openai/whisper: keys without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)

    def attend(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        n = x.shape[1]
        scale = DIM**-0.25
        q, k, v = (layer(x).view(*x.shape[:2], HEADS, -1) for layer in (self.query, self.key, self.value))
        qk = (q.permute(0, 2, 1, 3) * scale) @ (k.permute(0, 2, 3, 1) * scale)
        if mask is not None:
            qk = qk + mask[:n, :n]
        w = F.softmax(qk.float(), dim=-1).to(q.dtype)
        return self.out((w @ v.permute(0, 2, 1, 3)).permute(0, 2, 1, 3).flatten(start_dim=2))


@published("openai/whisper, the decoder")
class WhisperDecoder(Whisper):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.empty(448, 448).fill_(-math.inf).triu_(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(x, self.mask)


@published("openai/whisper, the encoder", reason=Reason.BIDIRECTIONAL, causal=False)
class WhisperEncoder(Whisper):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attend(x, None)


@published("facebookresearch/fairseq, wav2vec 2.0", inputs=padded, reason=Reason.BIDIRECTIONAL, causal=False)
class Wav2Vec2(Projected):
    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = (y.reshape(b * HEADS, n, DIM) for y in self.heads(x))
        weights = torch.bmm(q * DIM**-0.5, k.transpose(1, 2)).view(b, HEADS, n, n)
        weights = weights.masked_fill((padding == 0)[:, None, None].to(torch.bool), float("-inf")).view(b * HEADS, n, n)
        out = torch.bmm(F.softmax(weights, dim=-1), v).view(b, HEADS, n, DIM)
        return self.proj(merge(out))


@published("espnet/espnet, a conformer's relative positions", reason=Reason.BIDIRECTIONAL, causal=False)
class Conformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.pos, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.u, self.w = (nn.Parameter(torch.randn(HEADS, DIM)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, HEADS, DIM)
        k, v = split(self.k(x)), split(self.v(x))
        angles = torch.arange(n - 1, -n, -1.0)[:, None] / 10000 ** (torch.arange(0, WIDTH, 2) / WIDTH)
        p = self.pos(torch.cat([angles.sin(), angles.cos()], -1)).view(1, -1, HEADS, DIM).transpose(1, 2)
        ac = torch.matmul((q + self.u).transpose(1, 2), k.transpose(-2, -1))
        bd = torch.matmul((q + self.w).transpose(1, 2), p.transpose(-2, -1))
        bd = torch.cat([torch.zeros(*bd.shape[:3], 1), bd], dim=-1).view(b, HEADS, 2 * n, n)[:, :, 1:]
        bd = bd.reshape(b, HEADS, n, 2 * n - 1)[..., :n]
        return self.out(merge(torch.matmul(torch.softmax((ac + bd) / math.sqrt(DIM), dim=-1), v)))


@published("wenet-e2e/wenet, chunks that stream", inputs=padded)
class Wenet(Projected):
    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        positions = torch.arange(x.shape[1])
        ending = (torch.div(positions, 16, rounding_mode="trunc") + 1) * 16
        chunks = positions.unsqueeze(0) < ending.unsqueeze(1)
        mask = (padding.bool().unsqueeze(1) & chunks.unsqueeze(0)).unsqueeze(1).eq(0)
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(DIM)
        attn = torch.softmax(scores.masked_fill(mask, -float("inf")), dim=-1).masked_fill(mask, 0.0)
        return self.proj(merge(torch.matmul(attn, v)))


@published("speechbrain/speechbrain, a decoder by nn.MultiheadAttention")
class SpeechBrain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.att = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        mask = (torch.triu(torch.ones((n, n))) == 1).transpose(0, 1)
        mask = mask.float().masked_fill(mask == 0, float("-inf")).masked_fill(mask == 1, 0.0)
        return self.att(x, x, x, attn_mask=mask, need_weights=False)[0]


@published("suno-ai/bark")
class Bark(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(1024, 1024)).view(1, 1, 1024, 1024))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        full, n = k.shape[-2], q.shape[-2]
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, full - n : full, :full] == 0, float("-inf"))
        return self.proj(merge(F.softmax(att, dim=-1) @ v))
