"""Vision and diffusion models: most see everything, some are causal in frames or pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from stem_compile.reasons import Reason
from tests.published_modules.gpt import Projected
from tests.published_modules.published import DIM, HEADS, WIDTH, N, merge, published, split


@published("huggingface/pytorch-image-models, ViT", reason=Reason.BIDIRECTIONAL, causal=False)
class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
        attn = (q * DIM**-0.5) @ k.transpose(-2, -1)
        return self.proj((attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, n, c))


@published("microsoft/Swin-Transformer, shifted windows", reason=Reason.BIDIRECTIONAL, causal=False)
class Swin(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * 16 - 1, HEADS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        windows = x.view(-1, 16, WIDTH)
        q, k, v = self.heads(windows)
        index = torch.arange(16)[:, None] - torch.arange(16)[None, :] + 15
        bias = self.table[index.view(-1)].view(16, 16, -1).permute(2, 0, 1).contiguous()
        attn = q * DIM**-0.5 @ k.transpose(-2, -1) + bias.unsqueeze(0)
        region = (torch.arange(N) // 40).view(-1, 16)
        mask = region.unsqueeze(1) - region.unsqueeze(2)
        mask = mask.masked_fill(mask != 0, -100).masked_fill(mask == 0, 0).float()
        attn = attn.view(-1, N // 16, HEADS, 16, 16) + mask.unsqueeze(1).unsqueeze(0)
        attn = attn.view(-1, HEADS, 16, 16).softmax(-1)
        return self.proj(merge(attn @ v)).view(*x.shape)


@published("facebookresearch/deit, CaiT's class attention", reason=Reason.CROSS_ATTENTION, causal=False)
class CaiTClass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = split(self.q(x[:, :20])) * DIM**-0.5
        attn = (q @ split(self.k(x)).transpose(-2, -1)).softmax(dim=-1)
        return self.proj(merge(attn @ split(self.v(x))))


@published("facebookresearch/deit, CaiT's talking heads", reason=Reason.ESCAPES, causal=False)
class CaiTTalking(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.proj_l, self.proj_w = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        attn = q * DIM**-0.5 @ k.transpose(-2, -1)
        attn = self.proj_l(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(dim=-1)
        attn = self.proj_w(attn.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj(merge(attn @ v))


@published("facebookresearch/mae, the decoder", reason=Reason.BIDIRECTIONAL, causal=False)
class MAEDecoder(Projected):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        return self.proj(merge(F.scaled_dot_product_attention(q, k, v, dropout_p=0.0)))


@published("openai/image-gpt")
class ImageGPT(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(N, N, dtype=torch.bool)).view(1, 1, N, N))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        w = torch.matmul(q, k.transpose(-1, -2)) / float(v.size(-1)) ** 0.5
        w = torch.where(self.bias[:, :, : q.size(-2), : k.size(-2)], w, torch.tensor(torch.finfo(w.dtype).min))
        return self.proj(merge(torch.matmul(nn.Softmax(dim=-1)(w), v)))


@published("CompVis/latent-diffusion, the UNet's attention to text", reason=Reason.CROSS_ATTENTION, causal=False)
class UNetCross(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        context = x[:, :77].tanh()
        q, k, v = (
            split(y).reshape(-1, y.shape[1], DIM) for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        sim = torch.einsum("b i d, b j d -> b i j", q, k) * DIM**-0.5
        out = torch.einsum("b i j, b j d -> b i d", sim.softmax(dim=-1), v)
        return self.to_out(merge(out.view(x.shape[0], HEADS, -1, DIM)))


@published("openai/guided-diffusion, attention over pixels", reason=Reason.BIDIRECTIONAL, causal=False)
class GuidedDiffusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Conv1d(WIDTH, 3 * WIDTH, 1), nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2)
        b, c, n = x.shape
        q, k, v = self.qkv(x).reshape(b * HEADS, 3 * DIM, n).split(DIM, dim=1)
        weight = torch.einsum("bct,bcs->bts", q * DIM**-0.25, k * DIM**-0.25)
        weight = torch.softmax(weight.float(), dim=-1).type(weight.dtype)
        return self.proj(torch.einsum("bts,bcs->bct", weight, v).reshape(b, c, n)).transpose(1, 2)


@published("facebookresearch/DiT", reason=Reason.BIDIRECTIONAL, causal=False)
class DiT(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shift, scale, gate = self.modulation(F.silu(x.mean(1))).chunk(3, dim=1)
        y = F.layer_norm(x, (WIDTH,)) * (1 + scale[:, None]) + shift[:, None]
        q, k, v = self.heads(y)
        return x + gate[:, None] * self.proj(merge(F.scaled_dot_product_attention(q, k, v)))


@published("Stability-AI/sd3-ref, text and image joined", reason=Reason.BIDIRECTIONAL, causal=False)
class SD3Joint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = Projected(), Projected()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        text, image = x[:, :40], x[:, 40:]
        q, k, v = (torch.cat(p, dim=2) for p in zip(self.text.heads(text), self.image.heads(image)))
        out = merge(F.scaled_dot_product_attention(q, k, v, dropout_p=0.0, is_causal=False))
        return self.text.proj(out[:, :40]), self.image.proj(out[:, 40:])


@published("tianweiy/CausVid, frames that are causal among each other")
class CausVid(Projected):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        frame = torch.arange(x.shape[1]) // 20
        return self.proj(merge(F.scaled_dot_product_attention(q, k, v, attn_mask=frame[:, None] >= frame[None, :])))


@published("FoundationVision/VAR, scales that see all before")
class VAR(Projected):
    def __init__(self) -> None:
        super().__init__()
        scale = torch.cat([torch.full((n,), i) for i, n in enumerate((1, 4, 9, 16, 25, 36, 69))]).view(1, N, 1)
        bias = torch.where(scale >= scale.transpose(1, 2), 0.0, -torch.inf).reshape(1, 1, N, N)
        self.register_buffer("attn_bias_for_masking", bias.contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.heads(x)
        attn = (q * DIM**-0.5 @ k.transpose(-2, -1)).add_(self.attn_bias_for_masking)
        return self.proj(merge(attn.softmax(dim=-1) @ v))
