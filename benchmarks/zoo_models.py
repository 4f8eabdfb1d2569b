"""Tiny random-weight models of every causal-LM type of transformers: shrunk configs, stirred weights, one input for
all.

A config is shrunk by the names of its fields, since these hardly differ between types; ``OVERRIDES`` holds what a type
needs on top. Layers are chosen so that every kind of layer of a type is there once. Weights are scaled so that scores
are of order one: with the usual initialisation every softmax is almost uniform, and a wrong scale or a forgotten bias
would not show.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch

LENGTH = 200
"""Tokens: more than a block of 128, and ragged."""
PADDING = 45
"""Padded positions on the left of the first of two rows."""
LAYERS = 2
MOST_LAYERS = 8
MOST_WEIGHTS = 40_000_000
FIRST_TOKEN = 40
"""Smaller ids are for special tokens."""

WIDTH, HEADS, KEY_HEADS, HEAD_DIM, VOCABULARY, EXPERTS, WINDOW, POSITIONS = 64, 4, 2, 16, 256, 4, 64, 1024

SIZES: list[tuple[int, str]] = [
    (
        WIDTH,
        """hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim intermediate_size
        ffn_dim decoder_ffn_dim encoder_ffn_dim
        d_ff dff dim_ff d_inner n_inner ffn_hidden_size feed_forward_size intermediate_size_mlp
        dense_intermediate_size lru_width input_embedding_size
        output_embedding_size pronunciation_embed_dim shape_embed_dim prompt_mid_dim input_size hidden_size_global
        backbone_hidden_size ple_embed_dim
        attention_hidden_size router_hidden_size""",
    ),
    (
        32,
        """moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
        expert_ffn_hidden_size shared_intermediate_size
        moe_shared_expert_intermediate_size kv_lora_rank q_lora_rank index_head_dim o_lora_rank hc_lowrank lora_rank
        adapter_rank moe_latent_size""",
    ),
    (
        HEADS,
        """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads
        attention_heads num_decoder_attention_heads
        num_encoder_attention_heads swa_num_attention_heads index_n_heads linear_num_heads linear_num_value_heads
        num_experts n_routed_experts
        num_local_experts moe_num_experts zero_expert_num""",
    ),
    (
        HEAD_DIM,
        """head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim dim_head d_head attention_head_dim
        attention_head_size swa_head_dim swa_v_head_dim
        kv_channels d_kv rotary_dim linear_key_head_dim linear_value_head_dim linear_head_dim global_head_dim d_rel
        mamba_d_state state_size ssm_state_size
        mamba_d_head mamba_head_dim mamba_headdim mamba_dt_rank time_step_rank hidden_size_per_layer_input
        gated_norm_rank laurel_rank""",
    ),
    (2 * HEAD_DIM, "qk_head_dim"),
    (8, "mamba_n_heads mamba_num_heads num_blocks"),
    (
        KEY_HEADS,
        """linear_num_key_heads num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts
        num_experts_per_topk n_group
        num_expert_group o_groups mamba_n_groups n_groups mamba_ngroups index_topk_blocks""",
    ),
    (
        1,
        """topk_group num_shared_experts n_shared_experts moe_num_shared_experts first_k_dense_replace
        num_dense_layers num_nextn_predict_layers
        intermediate_multiple_size""",
    ),
    (
        WINDOW,
        """sliding_window sliding_window_size attention_chunk_size attention_window_size window_size local_attention
        local_attention_window_len index_topk
        keep_window_size chunk_size mamba_chunk_size block_size""",
    ),
    (
        POSITIONS,
        """max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions
        context_length model_max_length
        original_max_position_embeddings rel_extent mem_len""",
    ),
    (
        VOCABULARY,
        """vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size shape_vocab_size
        pronunciation_vocab_size audio_vocab_size
        encoder_hash_byte_group_vocab ngram_vocab_size_base""",
    ),
]
RULES = {name: size for size, names in SIZES for name in names.split()}
MULTI_HEADS = [
    "num_key_value_heads",
    "swa_num_key_value_heads",
    "num_global_key_value_heads",
    "kv_n_heads",
    "num_kv_heads",
    "num_query_groups",
]
LAYER_COUNTS = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "encoder_layers",
    "num_encoder_layers",
]

NEEDED = {
    "head_dim": HEAD_DIM,
    "num_experts_per_tok": KEY_HEADS,
    "n_routed_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "num_key_value_heads": KEY_HEADS,
    "n_shared_experts": 1,
}
"""Fields that some types leave None although they cannot do without."""
INDICES = ("moe_layers", "full_attn_idxs", "cross_attention_layers", "hybrid_layer_ids")
"""Lists of layer numbers, which the config computes anew."""

_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SHARED = {"num_hidden_layers": 4, "layer_types": [_SLIDING, _FULL] * 2, "num_kv_shared_layers": 2}
_SWA = {
    "swa_num_attention_heads": HEADS,
    "swa_num_key_value_heads": HEADS,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32,
} | {
    "swa_head_dim": 32,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_ADAPTERS = (("vision", "in_dim"), ("vision", "out_dim"), ("audio", "input_size"), ("audio", "out_dim"))
_INDEXER = {
    "indexer_n_heads": HEADS,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": WINDOW,
    "indexer_compress_ratio": 4,
}
_GEMMA3N = {**_SHARED, "intermediate_size": [WIDTH] * 4, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0]}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"layer_types": [_SLIDING, _FULL], "rope_parameters": {_SLIDING: _ROPE, _FULL: _ROPE}},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0, "ffn_config.moe_top_k": 2},
    "dots3_note": (
        dict.fromkeys((f"{part}_config.adapter_{field}" for part, field in _ADAPTERS), WIDTH)
        | {f"text_config.{k}": v for k, v in _SWA.items()}
    ),
    "dots3_note_text": _SWA,
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": _GEMMA3N,
    "gemma4": {"text_config.global_head_dim": 32},
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified": {"text_config.global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": [_LINEAR, _FULL]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", _FULL]},
    "mamba2": {"num_heads": 8},
    "musicgen": {"decoder.num_codebooks": 1},
    "musicgen_melody": {"decoder.num_codebooks": 1},
    "qwen4_exp": {f"text_config.{k}": v for k, v in _INDEXER.items()},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"hash_seed": 0, "axial_pos_shape": (16, 64), "axial_pos_embds_dim": (32, 32)},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": [_LINEAR, "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": [_LINEAR, "hybrid"] * 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""Fields a type needs beside the rules; ``a.b`` is field b of the nested config a. Other fields keep their rule."""
UNBUILT = {
    "gemma3n": "its vision tower needs the timm package (gemma3n_text covers the language model)",
    "gemma4_assistant": "drafts for another model and takes that model's keys and values",
    "gemma4_unified_assistant": "drafts for another model and takes that model's keys and values",
}
"""Types that no recipe can build, and why."""
PART = {"musicgen": "decoder", "musicgen_melody": "decoder"}
"""Types whose causal language model takes one of the config's parts."""


def types() -> list[str]:
    """Every type that the installed transformers lists for causal language models."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def model_class(model_type: str) -> Any:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def configs(model_type: str) -> Iterator[Any]:
    """Shrunk configs of a type, the best first: every kind of layer, the first layers, sizes alone. An exception in
    place of what is no valid config."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    own = OVERRIDES.get(model_type, {})
    flat = {k: v for k, v in own.items() if "." not in k}
    for layers in ("kinds", "first", "count"):
        try:
            nested: dict[str, dict[str, Any]] = {}
            for name, v in own.items():
                if "." in name:
                    nested.setdefault(name.split(".")[0], {})[name.split(".", 1)[1]] = v
            config = shrunk(kind, layers, flat, nested)
            yield getattr(config, PART[model_type]) if model_type in PART else config
        except Exception as error:
            yield error


def shrunk(kind: type, layers: str, own: dict[str, Any], nested: dict[str, dict[str, Any]]) -> Any:
    """Config of class ``kind``, smaller. layers: how per-layer lists are cut."""
    from transformers.configuration_utils import PretrainedConfig

    try:
        default = kind()
    except Exception:
        default = kind(**own)
    fields = dict(vars(default))
    values: dict[str, Any] = {}
    special = 3
    for name, v in fields.items():
        if name.startswith("_") or name in ("id2label", "label2id", "rope_parameters", "transformers_version", "dtype"):
            continue
        if isinstance(v, PretrainedConfig):
            values[name] = shrunk(type(v), layers, nested.get(name, {}), {})
        elif name == "is_decoder":
            values[name] = True
        elif name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            values[name] = {"p": 0, "b": 1, "e": 2}[name[0]]
        elif name.endswith(("_token_id", "_token_index")) and isinstance(v, int):
            values[name] = special
            special += 1
        elif v is None and name in NEEDED:
            values[name] = NEEDED[name]
        elif isinstance(v, bool) or not isinstance(v, int) or v == 0:
            continue
        elif name in RULES:
            values[name] = RULES[name]
        elif name in MULTI_HEADS:
            values[name] = (
                KEY_HEADS
                if any(isinstance(fields.get(n), int) and fields[n] > v for n in ("num_attention_heads", "n_heads"))
                else HEADS
            )
    values |= _layers(fields, layers)
    values |= own
    return kind(**values)


def _layers(fields: dict[str, Any], how: str) -> dict[str, Any]:
    """Numbers of layers and lists with an entry a layer."""
    counts = [n for n in LAYER_COUNTS if isinstance(fields.get(n), int)]
    if not counts:
        return {}
    total = fields[counts[0]]
    lists = {
        n: list(v)
        for n, v in fields.items()
        if isinstance(v, list | tuple) and len(v) == total > 2 and n not in INDICES
    }
    indices: set[int] = set()
    for values in lists.values():
        distinct: list[Any] = []
        for index, v in enumerate(values):
            if v not in distinct and len(distinct) < MOST_LAYERS:
                distinct.append(v)
                indices.add(index)
    rest = iter(range(total))
    while len(indices) < min(LAYERS, total):
        indices.add(next(rest))
    kept = sorted(indices)[:MOST_LAYERS]
    if how == "first":
        kept = list(range(max(kept) + 1))[:MOST_LAYERS]
    cut = {n: min(len(kept), fields[n]) if n == counts[0] else LAYERS for n in counts}
    if how == "count":
        return dict.fromkeys(cut, LAYERS)
    for name, values in lists.items():
        cut[name] = [_narrow(name, values[i]) for i in kept]
    return cut


def _narrow(name: str, v: Any) -> Any:
    """An entry of a per-layer list, with its size under the rules."""
    if "head" in name and isinstance(v, int):
        return HEADS
    return RULES.get(name, v) if isinstance(v, int) and not isinstance(v, bool) else v


def build(model_type: str, implementation: str) -> Any:
    """Model in eval mode and fp32, the same weights every time. Raises what the last recipe raised."""
    from transformers import AutoModelForCausalLM

    construct = model_class(model_type)._from_config if model_type in PART else AutoModelForCausalLM.from_config
    failure: Exception | None = None
    for config in configs(model_type):
        try:
            if isinstance(config, Exception):
                raise config
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with torch.device("meta"):
                    size = sum(p.numel() for p in construct(config, dtype=torch.float32).parameters())
                if size > MOST_WEIGHTS:
                    raise MemoryError(f"{size / 1e6:.0f}M weights after shrinking")
                torch.manual_seed(0)
                model = construct(config, attn_implementation=implementation, dtype=torch.float32).eval()
                plain = copy.deepcopy(model.state_dict())
                stir(model)
                with torch.no_grad():
                    result = logits(model, inputs(model))
                if not result.isfinite().all():
                    model.load_state_dict(plain)
                    logits(model, inputs(model))
            return model
        except Exception as error:
            failure = failure or error
    assert failure is not None
    raise failure


def stir(model: Any) -> None:
    """Give weights the size that keeps activations of order one, and vectors (biases, norms, sinks) some noise."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2 or float(parameter.std()) == 0:
                parameter.add_(0.1 * noise)
            elif float(parameter.std()) < 0.1:
                parameter.copy_(noise * 0.125)


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """Token ids of two rows and a mask that pads the first on the left."""
    ids = torch.randint(FIRST_TOKEN, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :PADDING] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(call: Any, given: dict[str, Any]) -> torch.Tensor:
    """Logits without a cache; types that know no ``use_cache`` are called without it."""
    try:
        out = call(**given, use_cache=False)
    except TypeError as error:
        if "use_cache" not in str(error):
            raise
        out = call(**given)
    result: torch.Tensor = out.logits if hasattr(out, "logits") else out[0]
    return result
