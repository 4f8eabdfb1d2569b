"""Tiny random-weight models of transformers types whose attention the backend rewrites. To add a type, add a line to
``TYPES``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

LAYERS = 2
PLAIN: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 128,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_shared_experts": 1,
}
"""Fields that nearly all types call the same; a type ignores those that it does not know."""
GPT: dict[str, Any] = {
    "n_embd": 64,
    "n_layer": LAYERS,
    "n_head": 4,
    "vocab_size": 128,
    "n_positions": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT: dict[str, Any] = {
    k: PLAIN[k]
    for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
} | {"ffn_dim": 64, "word_embed_proj_dim": 64}


@dataclass(frozen=True)
class Type:
    """config: fields beside or instead of ``base``. sites: attentions of the model, all of which must be rewritten."""

    config: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=lambda: PLAIN)
    sites: int = LAYERS


FULL_ATTENTION = {"layer_types": ["full_attention"] * LAYERS}
TYPES: dict[str, Type] = {
    "apertus": Type(),
    "arcee": Type(),
    "aria_text": Type(),
    "biogpt": Type(),
    "bitnet": Type(),
    "cohere": Type(),
    "diffllama": Type(sites=2 * LAYERS),
    "dots1": Type({"n_group": 1, "topk_group": 1} | FULL_ATTENTION),
    "ernie4_5": Type(),
    "ernie4_5_moe": Type(),
    "exaone4": Type({"sliding_window": None} | FULL_ATTENTION),
    "flex_olmo": Type(),
    "gemma": Type(),
    "glm": Type(),
    "glm4": Type(),
    "glm4_moe": Type(),
    "gpt2": Type(base=GPT),
    "gpt_bigcode": Type(base=GPT),
    "gpt_neox": Type(),
    "granite": Type(),
    "granitemoe": Type(),
    "granitemoeshared": Type(),
    "helium": Type(),
    "hunyuan_v1_dense": Type(),
    "hunyuan_v1_moe": Type(),
    "hyperclovax": Type(),
    "jais2": Type(),
    "llama": Type(),
    "minimax_m2": Type(),
    "ministral3": Type(),
    "mistral": Type({"sliding_window": None}),
    "mixtral": Type(),
    "nanochat": Type(),
    "nemotron": Type(),
    "olmo": Type(),
    "olmo2": Type(),
    "olmoe": Type(),
    "opt": Type(base=OPT),
    "persimmon": Type(),
    "phi": Type(),
    "phi3": Type(),
    "phimoe": Type(),
    "qwen2": Type(),
    "qwen2_moe": Type(),
    "qwen3": Type(),
    "qwen3_moe": Type(),
    "seed_oss": Type(),
    "smollm3": Type(),
    "solar_open": Type(),
    "stablelm": Type(),
    "starcoder2": Type(),
}


def known(name: str) -> bool:
    """Whether the installed transformers has the type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def model_of(
    name: str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", **config: Any
) -> torch.nn.Module:
    """A tiny model of the type in evaluation mode, the same weights every time. config: further fields.

    Weights are of a size that makes scores of order one: as initialised, every softmax is almost uniform and a wrong
    scale would not show.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = TYPES[name]
    whole = AutoConfig.for_model(name, **(kind.base | kind.config | config))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(whole, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model.to(device, dtype).eval()  # type: ignore[no-any-return]
