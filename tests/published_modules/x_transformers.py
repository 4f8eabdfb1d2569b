"""Attention in the einsum style of lucidrains' repositories."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import einsum, nn

from stem_compile.reasons import Reason
from tests.published_modules.published import DIM, HEADS, WIDTH, merge, padded, published, rotated, slopes, split


class Attention(nn.Module):
    """Projections without bias."""

    kv_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_kv = nn.Linear(WIDTH, 2 * self.kv_heads * DIM, bias=False)
        self.to_out = nn.Linear(WIDTH, WIDTH, bias=False)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        k, v = self.to_kv(x).chunk(2, dim=-1)
        return split(self.to_q(x)), split(k, self.kv_heads), split(v, self.kv_heads)


def hide_future(dots: torch.Tensor) -> torch.Tensor:
    """The causal mask of these repositories: keys may begin before the queries."""
    i, j = dots.shape[-2:]
    mask = torch.ones((i, j), dtype=torch.bool).triu(j - i + 1)
    return dots.masked_fill(mask, -torch.finfo(dots.dtype).max)


@published("lucidrains/x-transformers", inputs=padded)
class XTransformers(Attention):
    def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        dots = einsum("b h i d, b h j d -> b h i j", q, k) * DIM**-0.5
        dots = dots.masked_fill(~padding.bool()[:, None, None, :], -torch.finfo(dots.dtype).max)
        attn = hide_future(dots).softmax(dim=-1, dtype=torch.float32).type(dots.dtype)
        return self.to_out(merge(einsum("b h i j, b h j d -> b h i d", attn, v)))


@published("lucidrains/x-transformers, alibi_pos_bias with learned slopes")
class XAlibi(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.logslopes = nn.Parameter(slopes().log().view(-1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        n = x.shape[1]
        distance = -torch.abs(torch.arange(n)[None, None, :] - torch.arange(n)[None, :, None])
        dots = einsum("b h i d, b h j d -> b h i j", q, k) * DIM**-0.5 + distance * self.logslopes.exp()
        return self.to_out(merge(einsum("b h i j, b h j d -> b h i d", hide_future(dots).softmax(dim=-1), v)))


@published("lucidrains/x-transformers, attn_num_mem_kv")
class XMemory(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.mem_k, self.mem_v = (nn.Parameter(torch.randn(HEADS, 8, DIM)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        k, v = (
            torch.cat((m[None].expand(x.shape[0], -1, -1, -1), y), dim=-2)
            for m, y in ((self.mem_k, k), (self.mem_v, v))
        )
        dots = einsum("b h i d, b h j d -> b h i j", q, k) * DIM**-0.5
        n = x.shape[1]
        mask = F.pad(torch.ones((n, n), dtype=torch.bool).triu(1), (8, 0), value=False)
        dots = dots.masked_fill(mask, -torch.finfo(dots.dtype).max)
        return self.to_out(merge(einsum("b h i j, b h j d -> b h i d", dots.softmax(dim=-1), v)))


@published("lucidrains/x-transformers, talking heads", reason=Reason.SHAPE)
class XTalkingHeads(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.pre, self.post = (nn.Parameter(torch.randn(HEADS, HEADS)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        dots = einsum("b h i d, b h j d -> b h i j", q, k) * DIM**-0.5
        dots = einsum("b h i j, h k -> b k i j", dots, self.pre)
        attn = hide_future(dots).softmax(dim=-1)
        attn = einsum("b h i j, h k -> b k i j", attn, self.post)
        return self.to_out(merge(einsum("b h i j, b h j d -> b h i d", attn, v)))


@published("lucidrains/x-transformers, rel_pos_bias")
class XRelativeBias(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(32, HEADS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        n = x.shape[1]
        distance = torch.clamp(torch.arange(n)[:, None] - torch.arange(n)[None, :], min=0)
        far = 16 + (torch.log(distance.float().clamp(min=1) / 16) / torch.tensor(8.0).log() * 16).long()
        buckets = torch.where(distance < 16, distance, far.clamp(max=31))
        dots = einsum("b h i d, b h j d -> b h i j", q, k) * DIM**-0.5 + self.bias(buckets).permute(2, 0, 1) * 8
        return self.to_out(merge(einsum("b h i j, b h j d -> b h i d", hide_future(dots).softmax(dim=-1), v)))


@published("lucidrains/x-transformers, dynamic_pos_bias")
class XDynamicBias(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, HEADS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        n = x.shape[1]
        indices = torch.arange(n)[:, None] - torch.arange(n)[None, :] + n - 1
        bias = self.mlp(torch.arange(-n + 1, n)[:, None].float())[indices].permute(2, 0, 1)
        dots = einsum("b h i d, b h j d -> b h i j", q, k) * DIM**-0.5 + bias
        return self.to_out(merge(einsum("b h i j, b h j d -> b h i d", hide_future(dots).softmax(dim=-1), v)))


@published("lucidrains/x-transformers, attn_qk_norm with a learned scale")
class XNormed(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(HEADS, 1, 1) * 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        q, k = (F.normalize(y, dim=-1) for y in (q, k))
        dots = einsum("b h i d, b h j d -> b h i j", q, k) * self.scale.exp()
        return self.to_out(merge(einsum("b h i j, b h j d -> b h i d", hide_future(dots).softmax(dim=-1), v)))


@published("lucidrains/x-transformers, attn_sparse_topk", reason=Reason.MASK)
class XTopK(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        dots = hide_future(einsum("b h i d, b h j d -> b h i j", q, k) * DIM**-0.5)
        top, _ = dots.topk(8, dim=-1)
        dots = dots.masked_fill(dots < top[..., -1:], -torch.finfo(dots.dtype).max)
        return self.to_out(merge(einsum("b h i j, b h j d -> b h i d", dots.softmax(dim=-1), v)))


@published("lucidrains/x-transformers, attn_one_kv_head")
class XOneKeyHead(Attention):
    kv_heads = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        k, v = (y.squeeze(1) for y in (k, v))
        dots = einsum("b h i d, b j d -> b h i j", q, k) * DIM**-0.5
        return self.to_out(merge(einsum("b h i j, b j d -> b h i d", hide_future(dots).softmax(dim=-1), v)))


@published("lucidrains/PaLM-pytorch")
class PaLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fused, self.out = nn.Linear(WIDTH, WIDTH + 2 * DIM, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.fused(x).split((WIDTH, DIM, DIM), dim=-1)
        q, k = rotated(split(q)), rotated(k)
        sim = einsum("b h i d, b j d -> b h i j", q * DIM**-0.5, k)
        mask = torch.ones((x.shape[1], x.shape[1]), dtype=torch.bool).triu(1)
        attn = sim.masked_fill(mask, -torch.finfo(sim.dtype).max).softmax(dim=-1)
        return self.out(merge(einsum("b h i j, b j d -> b h i d", attn, v)))


@published("lucidrains/grouped-query einsum, as in fkodom/grouped-query-attention-pytorch")
class GroupedEinsum(Attention):
    kv_heads = 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        b, n, _ = x.shape
        q = q.view(b, self.kv_heads, HEADS // self.kv_heads, n, DIM)
        sim = einsum("b h g n d, b h s d -> b h g n s", q * DIM**-0.5, k)
        attn = hide_future(sim).softmax(dim=-1)
        return self.to_out(einsum("b h g n s, b h s d -> b n h g d", attn, v).reshape(b, n, -1))


@published("lucidrains/perceiver-ar-pytorch, queries behind a prefix")
class PerceiverAR(Attention):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        q = q[:, :, 60:]
        sim = einsum("b h i d, b h j d -> b h i j", q * DIM**-0.5, k)
        return self.to_out(merge(einsum("b h i j, b h j d -> b h i d", hide_future(sim).softmax(dim=-1), v)))


@published("lucidrains/RETRO-pytorch, a null key and value")
class NullKeyValue(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.null_k, self.null_v = (nn.Parameter(torch.randn(HEADS * DIM)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        null = (y.view(1, HEADS, 1, DIM).expand(x.shape[0], -1, -1, -1) for y in (self.null_k, self.null_v))
        k, v = (torch.cat((first, y), dim=2) for first, y in zip(null, (k, v)))
        sim = einsum("b h i d, b h j d -> b h i j", q * DIM**-0.5, k)
        return self.to_out(merge(einsum("b h i j, b h j d -> b h i d", hide_future(sim).softmax(dim=-1), v)))


@published("lucidrains/DALLE-pytorch, a static pattern beside the causal mask")
class Dalle(Attention):
    def __init__(self) -> None:
        super().__init__()
        mask = (torch.arange(160)[:, None] - torch.arange(160)[None, :]) % 8 == 0
        self.register_buffer("static_mask", mask | (torch.arange(160) < 16)[None, :])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        n = x.shape[1]
        dots = torch.einsum("b h i d, b h j d -> b h i j", q * DIM**-0.5, k)
        dots = dots.masked_fill(torch.ones(n, n, dtype=torch.bool).triu_(1), -torch.finfo(dots.dtype).max)
        dots = dots.masked_fill(~self.static_mask[:n, :n], -torch.finfo(dots.dtype).max)
        return self.to_out(merge(torch.einsum("b h i j, b h j d -> b h i d", torch.softmax(dots, dim=-1), v)))
