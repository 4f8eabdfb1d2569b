"""``assert_equivalent``: silent where the model is right, and readable where it is not."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from stem_compile.testing import Violation, assert_equivalent
from stem_compile.testing.violation import Inapplicable
from tests.testing.factories import no_fp64, not_a_number
from tests.testing.faults import FAULTS, Fault
from tests.testing.models import encoder, plain, transformer

SPARSE = {"budget": 0.5}


def planted(name: str) -> Fault:
    return next(f for f in FAULTS if f.name == name)


def tokens(length: int, vocabulary: int = 50) -> torch.Tensor:
    return torch.randint(1, vocabulary, (2, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("options", [None, SPARSE], ids=["dense", "sparse"])
def test_a_right_model_passes(options: dict[str, float] | None) -> None:
    assert_equivalent(plain(), tokens(421), options=options)


def test_a_right_padded_transformer_passes() -> None:
    mask = torch.ones(2, 421, dtype=torch.long)
    mask[0, :70] = 0
    assert_equivalent(transformer("llama"), options=SPARSE, input_ids=tokens(421), attention_mask=mask, use_cache=False)


def test_the_failure_names_layer_and_position_and_its_snippet_fails_again() -> None:
    model = transformer("llama")
    with planted("values of the neighbouring key head").planted():
        with pytest.raises(Violation) as caught:
            assert_equivalent(model, input_ids=tokens(100), use_cache=False)
        message = str(caught.value)
        assert "the compiled model is not equivalent" in message
        assert "first attention: model.layers.0.self_attn" in message
        assert re.search(
            r"first position there: batch row 0, head \d, position 0 \(query block 0\): error \S+, budget \S+", message
        )
        snippet = "\n".join(line.removeprefix("    ") for line in message.partition("reproduce:\n\n")[2].splitlines())
        assert "torch.randint(" in snippet
        with pytest.raises(Violation, match="not equivalent"):
            exec(snippet, {"model": model})
    exec(snippet, {"model": model})


@pytest.mark.parametrize(
    ("model", "why"), [(not_a_number, "is NaN at batch row 0, position 0"), (no_fp64, "does not run in fp64")]
)
def test_a_model_with_nothing_to_compare_with_is_said_to_be(model: Any, why: str) -> None:
    with pytest.raises(Inapplicable, match=why):
        assert_equivalent(model(), tokens(100))


def test_a_model_that_stays_dense_is_said_to() -> None:
    with pytest.raises(Violation, match="no attention was rewritten"):
        assert_equivalent(encoder(), torch.randn(2, 100, 64))
