"""``generate_batch`` with ``attn_implementation="stem"``: eager's tokens, chunks that select as one shot, no N x N
tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import stem_compile
from stem_compile.selection import Observed, observe
from tests.test_transformers_attention import CONFIGS, build, names

transformers = pytest.importorskip("transformers")
__all__ = ["names"]


def batches(model: Any, prompts: list[list[int]], most: int, new: int = 6, pages: int = 400) -> list[list[int]]:
    """Tokens that continuous batching generates, in the order of the prompts. most: tokens of a step."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    out = model.generate_batch(
        inputs=prompts,
        generation_config=transformers.GenerationConfig(
            max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=pages, page_size=16, max_batch_tokens=most),
        progress_bar=False,
    )
    return [list(out[key].generated_tokens) for key in sorted(out, key=lambda name: int(name.rsplit("_", 1)[-1]))]


def prompts(*lengths: int) -> list[list[int]]:
    torch.manual_seed(3)
    return [torch.randint(1, 64, (length,)).tolist() for length in lengths]


@pytest.mark.parametrize("most", [700, 300])
@pytest.mark.parametrize("kind", CONFIGS)
def test_tokens_are_eagers(kind: str, most: int) -> None:
    eager, stem, given = build(kind, "eager"), build(kind, "stem"), prompts(400, 150, 40)
    expected = []
    with torch.inference_mode():
        for ids in given:
            whole = eager.generate(
                torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            expected.append(whole[0, len(ids) :].tolist())
    observed: list[Observed] = []
    with observe(observed.append):
        assert batches(stem, given, most) == expected
    assert observed, "long prompts are prefilled sparsely"
    assert stem.config._attn_implementation == "stem", "the name is given back"


def lists(most: int) -> list[torch.Tensor]:
    """Blocks that each row of queries of a prompt of 512 tokens computes, [layers, heads, rows, key blocks]."""
    observed: list[Observed] = []
    with observe(observed.append):
        batches(build("llama", "stem_chunks"), prompts(512), most, new=1)
    layers: dict[int, list[torch.Tensor]] = {}
    for number, o in enumerate(observed):
        dense = o.selection.dense(o.candidates.expand(*o.selection.counts.shape, -1))[0]
        layers.setdefault(number % 3, []).append(torch.nn.functional.pad(dense, (0, 8 - dense.shape[-1])))
    return [torch.cat(rows, 1) for _, rows in sorted(layers.items())]


def test_four_chunks_select_as_one_shot() -> None:
    stem_compile.register_attention("stem_chunks", options={"budget": 0.25, "min_length": 1, "block_size": 64})
    whole, chunks = lists(512), lists(128)
    assert [w.shape for w in whole] == [c.shape for c in chunks] == [(4, 8, 8)] * 3
    assert all(torch.equal(a, b) for a, b in zip(whole, chunks, strict=True))
    assert any(bool(w.sum() < torch.ones(4, 8, 8).tril().sum()) for w in whole), "something is left out"


def test_a_packed_attention_outside_of_continuous_batching_says_so() -> None:
    model = build("llama", "stem")
    model.set_attn_implementation("stem_packed")
    with pytest.raises(ValueError, match="serves generate_batch alone"):
        model(torch.tensor([[1, 2, 3]]))
