"""The strategies that users compose: each draws records that can be built, printed and run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_compile.algebra.masks import Mask, decode, encode
from stem_compile.testing import assert_equivalent, attention_inputs, masks, model_inputs, spellings
from stem_compile.testing.spellings import WAYS, Spelling
from stem_compile.testing.strategies import AttentionInputs, ModelInputs
from tests.testing.models import plain, transformer

PLAIN, LLAMA = plain(), transformer("llama")


@given(attention_inputs(max_length=100))
def test_attention_inputs_have_the_shapes_they_say(drawn: AttentionInputs) -> None:
    q, k, v = drawn.tensors()
    batch, heads, q_len, kv_len = drawn.shape
    assert q.shape == (batch, heads, q_len, drawn.head_dim)
    assert k.shape == (batch, drawn.key_heads, kv_len, drawn.head_dim)
    assert v.shape == (batch, drawn.key_heads, kv_len, drawn.value_dim)
    again = eval(repr(drawn)).tensors()
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip((q, k, v), again))


@given(masks(offset=40), st.integers(1, 120))
def test_masks_mean_something_and_survive_their_text(mask: Mask, q_len: int) -> None:
    shape, padding = (2, 3, q_len, 40 + q_len), torch.ones(2, 40 + q_len, dtype=torch.long)
    dense = mask.dense(shape, [padding], [])
    assert dense.expand(shape).any(-1).all()
    assert torch.equal(decode(encode(mask)).dense(shape, [padding], []), dense)


@given(spellings(), attention_inputs(max_length=100, head_dims=(16,)))
def test_spellings_are_one_attention(spelling: Spelling, drawn: AttentionInputs) -> None:
    q, k, v = (x[:, :, -drawn.q_len :] for x in drawn.tensors(torch.float64))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(spelling(q, k, v), expected)


class Spelled(torch.nn.Module):
    """One attention with nothing around it."""

    def __init__(self, spelling: Spelling) -> None:
        super().__init__()
        self.spelling = spelling

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.spelling(q, k, v).transpose(1, 2)


@pytest.mark.parametrize("way", sorted(WAYS))
def test_every_spelling_is_rewritten(way: str) -> None:
    assert_equivalent(
        Spelled(Spelling(way)),
        *AttentionInputs(batch=2, heads=4, key_heads=2, q_len=421).tensors(),
        options={"budget": 0.5},
    )


@settings(max_examples=5)
@given(model_inputs(PLAIN, max_length=100))
def test_model_inputs_of_a_plain_module(drawn: ModelInputs) -> None:
    with torch.no_grad():
        assert PLAIN(*drawn.args, **drawn.kwargs).shape[:2] == (drawn.case.batch, drawn.case.length)
    assert drawn.valid is None


@settings(max_examples=10)
@given(model_inputs(LLAMA, max_length=100))
def test_model_inputs_of_a_transformer(drawn: ModelInputs) -> None:
    with torch.no_grad():
        logits = LLAMA(*drawn.args, **drawn.kwargs).logits
    assert logits.shape[:2] == (drawn.case.batch, drawn.case.length)
    assert drawn.valid is None or (~drawn.valid).sum() == drawn.case.pad
