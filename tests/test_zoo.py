"""A representative part of the zoo (``benchmarks/zoo.py``): types whose attention differs in kind, under SDPA and written out."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import zoo, zoo_models

PLAIN, WINDOW, CHUNK = "causal & padding", "causal & sliding window of 64 & padding", "causal & chunks of 64 & padding"
EXPECTED: dict[str, dict[str, list[str] | None]] = {
    "llama": {"sdpa": [PLAIN] * 2, "eager": [PLAIN] * 2},
}
"""Type, implementation: the masks and scores in words, an attention each, all of them rewritten. None where that is still to come."""

CASES = [(model_type, implementation) for model_type, expected in EXPECTED.items() for implementation in expected]


@pytest.fixture(scope="module", autouse=True)
def _transformers() -> None:
    pytest.importorskip("transformers")


@pytest.mark.parametrize(("model_type", "implementation"), CASES, ids="-".join)
def test_a_type(model_type: str, implementation: str) -> None:
    record = zoo.measure(model_type, implementation)
    assert record["status"] == "ok", record["error"]
    assert record["golden"] == "fp64"
    assert not record["chaotic"]
    assert record["verdict"] == "equal", {k: record[k] for k in ("eager_error", "stem_error", "ratio", "where")}
    assert record["graphs"] == record["plain_graphs"] == 1
    assert record["quadratic"] == 0
    expected = EXPECTED[model_type][implementation]
    if expected is not None:
        assert not record["missed"], record["missed"][0]["listing"]
        assert not record["rejected"]
        assert record["masks"] == expected
        assert record["square"] == 0


def test_all_types_are_known() -> None:
    """A recipe for a type that transformers does not list is a misspelling."""
    names: set[str] = {*EXPECTED, *zoo_models.OVERRIDES, *zoo_models.UNBUILT, *zoo_models.PART}
    assert names <= set(zoo_models.types())


def test_a_type_that_cannot_be_built_says_why() -> None:
    record: dict[str, Any] = zoo.measure("gemma4_assistant", "eager")
    assert (record["status"], record["error"]) == ("build", zoo_models.UNBUILT["gemma4_assistant"])


def test_a_wrong_output_is_told_from_a_rounding() -> None:
    """The verdict itself: one key more in one row of one head is an error, another order of summation is not."""
    model = zoo_models.build("llama", "eager")
    given = zoo_models.inputs(model)
    real = given["attention_mask"].bool()
    import torch

    with torch.no_grad():
        eager, golden = zoo_models.logits(model, given), zoo.golden(model, given)
        flipped = given["attention_mask"].clone()
        flipped[0, zoo_models.PADDING] = 0
        wrong = zoo_models.logits(model, given | {"attention_mask": flipped})
    assert golden is not None
    assert zoo.compare({}, eager + 1e-7, eager, golden, real)["verdict"] == "equal"
    assert zoo.compare({}, wrong, eager, golden, real)["verdict"] == "differs"
