"""A tiny language model and a tokenizer for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")


class Characters:
    """A tokenizer with one token a character."""

    def __call__(self, text: str) -> Any:
        return transformers.BatchEncoding({"input_ids": [ord(c) for c in text]})

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def tiny_llama(vocab: int = 64) -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, max_position_embeddings=4096)).eval()
