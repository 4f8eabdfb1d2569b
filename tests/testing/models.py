"""Models under test, tiny and with random weights: the default one, and one of each transformers type that runs
offline."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 64,
    "head_dim": 16,
}


def transformer(model_type: str, **overrides: Any) -> torch.nn.Module:
    """A causal language model of a transformers type, the same weights every time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(TINY | overrides))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()  # type: ignore[no-any-return]


class Plain(torch.nn.Module):
    """A causal attention without transformers: token ids [batch, length] -> logits."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 64)
        self.heads = heads
        self.qkv = torch.nn.Linear(64, 48 * heads)
        self.out = torch.nn.Linear(16 * heads, 50)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            x.unflatten(-1, (self.heads, 16)).transpose(1, 2) for x in self.qkv(self.embedding(tokens)).chunk(3, -1)
        )
        out: torch.Tensor = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return out


class Fractions(Plain):
    """A window of fractional positions, which ends where rounding in fp32 puts it."""

    def mask(self, n: int) -> torch.Tensor:
        i, j = torch.arange(n)[:, None], torch.arange(n)[None]
        return ((i * 0.02 - j * 0.02) <= 0.5) & (j <= i)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            x.unflatten(-1, (self.heads, 16)).transpose(1, 2) for x in self.qkv(self.embedding(tokens)).chunk(3, -1)
        )
        mask = self.mask(tokens.shape[1])
        out: torch.Tensor = self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return out


class Unequal(Plain):
    """One key head for all query heads, and a value head for each."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            x.unflatten(-1, (self.heads, 16)).transpose(1, 2) for x in self.qkv(self.embedding(tokens)).chunk(3, -1)
        )
        k = k[:, :1].expand(k.shape)
        out: torch.Tensor = self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return out


def plain() -> torch.nn.Module:
    """``Plain`` with the same weights every time; also what the command line's tests name as their factory."""
    torch.manual_seed(0)
    return Plain().eval()


def encoder() -> torch.nn.Module:
    """torch.nn.TransformerEncoder, which is bidirectional."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(64, 4, 64, dropout=0.0, batch_first=True)
    return torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def _seeded(make: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    torch.manual_seed(0)
    return make().eval()


SUBJECTS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": lambda: transformer("llama"),
    "fractional positions": lambda: _seeded(Fractions),
    "unequal heads": lambda: _seeded(Unequal),
}
"""Models that faults are planted under."""
