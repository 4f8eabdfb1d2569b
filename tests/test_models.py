"""Models of transformers through ``backend="stem"``: one graph, every layer rewritten, eager's outputs at
``budget=1.0``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import stem_compile
from stem_compile import backend
from stem_compile.passes.graph.values import value
from stem_compile.passes.pipeline import Rewrite
from tests.models import LAYERS, NAMES, build, left_padding, tokens
from tests.numerics import assert_close, assert_within

OPTIONS: dict[str, Any] = {"budget": 1.0, "min_length": 0, "inner": "eager", "verify": True}
LENGTH = 300


@contextmanager
def rewrites() -> Iterator[list[Rewrite]]:
    rewritten: list[Rewrite] = []
    with backend.listen(rewritten.append):
        yield rewritten


def compare(name: str, words: str, ids: torch.Tensor, **inputs: Any) -> None:
    """Compiled against eager in fp32, both against fp64; one graph, all layers, the mask in ``words``."""
    model = build(name)
    with torch.no_grad():
        eager = model(ids, **inputs).logits
        golden = build(name, torch.float64)(ids, **inputs).logits
        with rewrites() as rewritten:
            ours = torch.compile(model, backend="stem", options=OPTIONS, fullgraph=True)(ids, **inputs).logits
    assert len(rewritten) == 1
    assert [s.words for s in rewritten[0].sites] == [words] * LAYERS == [words] * len(rewritten[0].attentions)
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones(ids.shape, dtype=torch.bool)
    assert not ours.isnan().any()
    assert_within(ours[real], golden[real], eager[real])


@pytest.mark.parametrize("name", NAMES)
def test_without_a_mask(name: str) -> None:
    compare(name, "causal", tokens(LENGTH))


@pytest.mark.parametrize("name", NAMES)
def test_a_left_padded_batch(name: str) -> None:
    compare(name, "causal & padding", tokens(LENGTH), attention_mask=left_padding(LENGTH), use_cache=False)


def test_a_right_padded_batch() -> None:
    compare("llama", "causal & padding", tokens(LENGTH), attention_mask=left_padding(LENGTH).flip(1))


def test_a_mask_of_ones() -> None:
    compare("llama", "causal & padding", tokens(LENGTH, 1), attention_mask=torch.ones(1, LENGTH, dtype=torch.long))


@pytest.mark.parametrize("name", NAMES)
def test_a_second_call_on_a_cached_prefix(name: str) -> None:
    model, ids, mask = build(name), tokens(LENGTH), left_padding(LENGTH)

    def second(m: Any, call: Any) -> torch.Tensor:
        cache = m(ids[:, :130], attention_mask=mask[:, :130]).past_key_values
        logits: torch.Tensor = call(ids[:, 130:], attention_mask=mask, past_key_values=cache).logits
        return logits

    with torch.no_grad(), rewrites() as rewritten:
        ours = second(model, torch.compile(model, backend="stem", options=OPTIONS, fullgraph=True))
        eager, wide = second(model, model), build(name, torch.float64)
        golden = second(wide, wide)
    assert [s.words for s in rewritten[0].sites] == ["causal(offset=130) & padding"] * LAYERS
    assert_within(ours, golden, eager)


def test_explain_tells_every_layer() -> None:
    ids, mask = tokens(LENGTH), left_padding(LENGTH)
    with torch.no_grad():
        told = stem_compile.explain(
            build("llama"), {"budget": 0.5, "min_length": 0, "block_size": 64, "sink_blocks": 1, "local_blocks": 1}
        )(ids, attention_mask=mask)
    data = told.to_dict()
    assert data["graphs"] == 1
    assert [s["name"] for s in data["sites"]] == [f"model.layers.{i}.self_attn" for i in range(LAYERS)]
    for site in data["sites"]:
        assert set(site) == {"name", "decision", "reason", "mask", "density", "density_of_heads", "kernel"} | {
            "q_shape",
            "k_shape",
            "v_shape",
        }
        assert (site["decision"], site["reason"], site["mask"]) == ("rewritten", None, "causal & padding")
        assert 0 < site["density"] < 1
        assert site["q_shape"] == (2, 4, LENGTH, 16)
        assert site["k_shape"] == (2, 2, LENGTH, 16)
    assert "causal & padding" in str(told)


def test_explain_says_why_not() -> None:
    model = build("llama")
    told = stem_compile.explain(model, {"min_length": 10**6})(tokens(LENGTH))
    assert [s["reason"] for s in told.to_dict()["sites"]] == ["short"] * LAYERS
    assert "lower min_length" in " ".join(str(told).split())


def test_no_tensor_of_n_by_n_is_left() -> None:
    with torch.no_grad(), rewrites() as rewritten:
        torch.compile(build("llama"), backend="stem", options=OPTIONS)(
            tokens(LENGTH), attention_mask=left_padding(LENGTH), use_cache=False
        )
    shapes = [tuple(value(n).shape) for n in rewritten[0].module.graph.nodes if isinstance(value(n), torch.Tensor)]
    assert shapes
    assert not [s for s in shapes if s[-2:] == (LENGTH, LENGTH)]


def test_one_model_serves_all_lengths() -> None:
    """First compilation static, second symbolic, third for what is under min_length: no more."""
    model = build("llama")
    compiled = torch.compile(model, backend="stem", options={**OPTIONS, "min_length": 512}, fullgraph=True)
    with torch.no_grad(), rewrites() as rewritten:
        for length in (1024, 1500, 1111, 300, 100, 2000, 777, 512, 511):
            ids, mask = tokens(length), left_padding(length)
            ours = compiled(ids, attention_mask=mask, use_cache=False, logits_to_keep=8).logits
            eager = model(ids, attention_mask=mask, use_cache=False, logits_to_keep=8).logits
            assert_close(ours, eager)
    assert [len(m.sites) for m in rewritten] == [LAYERS, LAYERS, 0]


def test_symbolic_chunks_on_a_cache() -> None:
    model = build("llama")
    compiled = torch.compile(model, backend="stem", options=OPTIONS, fullgraph=True)
    with torch.no_grad(), rewrites() as rewritten:
        for first, more in ((130, 90), (200, 100), (171, 77), (160, 64)):
            ids = tokens(first + more, 1)
            caches = [model(ids[:, :first]).past_key_values for _ in range(2)]
            ours = compiled(ids[:, first:], past_key_values=caches[0]).logits
            eager = model(ids[:, first:], past_key_values=caches[1]).logits
            assert_close(ours, eager)
    assert all(len(m.sites) == LAYERS for m in rewritten)
    assert len(rewritten) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
def test_other_inner_backends(inner: str) -> None:
    model, ids = build("llama"), tokens(LENGTH)
    with torch.no_grad():
        ours = torch.compile(model, backend="stem", options={**OPTIONS, "inner": inner}, fullgraph=True)(
            ids, attention_mask=left_padding(LENGTH)
        ).logits
        eager = model(ids, attention_mask=left_padding(LENGTH)).logits
        golden = build("llama", torch.float64)(ids, attention_mask=left_padding(LENGTH)).logits
    assert_within(ours[1], golden[1], eager[1])
