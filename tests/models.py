"""Tiny random-weight models of transformers, and the inputs that users give them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
}
LAYERS = 2
NAMES = ("llama", "qwen3", "mistral", "gpt2")


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Model in eval mode, the same weights every time."""
    transformers = pytest.importorskip("transformers")
    configs = {
        "llama": lambda: transformers.LlamaConfig(**SMALL),
        "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=16),
        "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=None),
        "gpt2": lambda: transformers.GPT2Config(
            n_embd=64, n_layer=2, n_head=4, vocab_size=100, bos_token_id=1, eos_token_id=2
        ),
    }
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(configs[name]()).to(dtype).eval()


def tokens(length: int, batch: int = 2) -> torch.Tensor:
    """int64 [batch, length]."""
    return torch.randint(0, 100, (batch, length), generator=torch.Generator().manual_seed(length))


def left_padding(length: int, pad: int = 45) -> torch.Tensor:
    """Attention mask [2, length] whose first row starts ``pad`` tokens late."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, :pad] = 0
    return mask
