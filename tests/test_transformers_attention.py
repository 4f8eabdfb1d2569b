"""``attn_implementation="stem"``: the same outputs, tokens and blocks as eager and as the compiled model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import stem_compile
from stem_compile.config import OptionError
from stem_compile.reasons import StemWarning
from stem_compile.selection import Observed, observe
from tests.numerics import assert_close_by_largest

transformers = pytest.importorskip("transformers")

LENGTH = 400
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 2048,
    "head_dim": 16,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, sliding_window=96, layer_types=LAYERS),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SMALL, num_local_experts=2, num_experts_per_tok=1, sliding_window=96, layer_types=LAYERS
    ),
}


def build(kind: str, implementation: str) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[kind]())
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()
    for parameter in model.parameters():  # weights of the default scale give nearly even attention
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    return model


def inputs(pad: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, 64, (2, LENGTH))
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(autouse=True)
def names() -> Iterator[None]:
    from transformers import AttentionInterface, AttentionMaskInterface

    stem_compile.register_attention("stem", options={"budget": 1.0, "min_length": 1})
    stem_compile.register_attention("stem_quarter", options={"budget": 0.25, "min_length": 1})
    yield
    for name in ("stem", "stem_quarter"):
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)


@pytest.mark.parametrize("pad", [0, 7])
@pytest.mark.parametrize("kind", CONFIGS)
def test_logits_and_tokens_are_eagers(kind: str, pad: int) -> None:
    eager, stem, given = build(kind, "eager"), build(kind, "stem"), inputs(pad)
    observed: list[Observed] = []
    with torch.inference_mode(), observe(observed.append):
        expected, actual = eager(**given).logits, stem(**given).logits
        arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        tokens, sparse_tokens = eager.generate(**given, **arguments), stem.generate(**given, **arguments)
    assert len(observed) == 2 * SMALL["num_hidden_layers"], "every layer of both prefills is sparse, no decode is"
    real = given["attention_mask"].bool()
    assert_close_by_largest(actual[real], expected[real])
    assert torch.equal(tokens, sparse_tokens)


def blocks(run: Any) -> list[torch.Tensor]:
    observed: list[Observed] = []
    with torch.inference_mode(), observe(observed.append):
        run()
    return [o.selection.counts.flatten() for o in observed] + [o.selection.indices.flatten() for o in observed]


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt_oss"])
def test_the_selection_is_the_compiled_models(kind: str) -> None:
    given = inputs(5)
    options = {"budget": 0.25, "min_length": 1, "inner": "eager"}
    compiled = torch.compile(build(kind, "sdpa" if kind != "gpt_oss" else "eager"), backend="stem", options=options)
    registered = build(kind, "stem_quarter")
    expected, actual = blocks(lambda: compiled(**given)), blocks(lambda: registered(**given))
    assert len(expected) == len(actual) > 0
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_chunks_on_a_cache_select_as_one_shot() -> None:
    stem_compile.register_attention(
        "stem_quarter", options={"budget": 0.25, "min_length": 1, "prompt_length": 512, "block_size": 64}
    )
    model = build("llama", "stem_quarter")
    torch.manual_seed(2)
    ids = torch.randint(1, 64, (1, 512))
    with torch.inference_mode():
        whole = model(input_ids=ids).logits
        cache, parts = transformers.DynamicCache(config=model.config), []
        for start in range(0, 512, 128):
            parts.append(model(input_ids=ids[:, start : start + 128], past_key_values=cache).logits)
    assert_close_by_largest(torch.cat(parts, 1), whole)


def test_a_model_that_computes_with_its_mask_gets_the_dense_one() -> None:
    from stem_compile.serving import transformers as serving

    serving._warn_once.cache_clear()
    mask = serving.prefill_mask(stem_compile.StemConfig(min_length=1), 1, 8, 8)
    assert isinstance(mask, serving.PrefillMask)
    with pytest.warns(StemWarning, match="computes with its attention mask"):
        sliced = mask[:, :, :, :4]
    assert torch.equal(sliced[0, 0], torch.ones(8, 8, dtype=torch.bool).tril()[:, :4])
    assert torch.equal(torch.logical_not(mask)[0, 0], torch.ones(8, 8, dtype=torch.bool).triu(1))


def test_short_prompts_and_decoding_are_left_to_sdpa() -> None:
    stem_compile.register_attention("stem", options={"budget": 0.25, "min_length": 4096})
    assert blocks(lambda: build("llama", "stem")(**inputs(3))) == []


def test_wrong_options_and_taken_names_are_refused() -> None:
    with pytest.raises(OptionError, match="budgte"):
        stem_compile.register_attention("stem", options={"budgte": 0.25})
    with pytest.raises(ValueError, match="'sdpa' is an attention of transformers itself"):
        stem_compile.register_attention("sdpa")


def test_unknown_arguments_fall_to_sdpa_with_one_warning() -> None:
    from transformers import AttentionInterface

    from stem_compile.serving import transformers as serving

    serving._warn_once.cache_clear()
    attention = AttentionInterface._global_mapping["stem"]
    module = torch.nn.Module()
    module.is_causal = True
    q = torch.randn(1, 2, 16, 8)
    bias = torch.randn(1, 2, 16, 16)
    with pytest.warns(StemWarning, match="position_bias"):
        out, _ = attention(module, q, q, q, None, position_bias=bias)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(module, q, q, q, None, position_bias=bias)
    scores = q @ q.mT / 8**0.5 + bias
    scores = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(out.transpose(1, 2), scores.softmax(-1) @ q)
