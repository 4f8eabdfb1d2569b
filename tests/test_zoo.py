"""A representative part of the zoo (``benchmarks/zoo.py``): types whose attention differs in kind, under SDPA and
written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import zoo, zoo_models
from benchmarks.zoo_graphs import Chain, handwritten

PLAIN, WINDOW, CHUNK = "causal & padding", "causal & sliding window of 64 & padding", "causal & chunks of 64 & padding"


def both(*words: str) -> dict[str, list[str] | None]:
    return {"sdpa": list(words), "eager": list(words)}


EXPECTED: dict[str, dict[str, list[str] | None]] = {
    "llama": both(PLAIN, PLAIN),
    "qwen3": both(PLAIN, PLAIN),
    "phi3": both(PLAIN, PLAIN),
    "opt": both(PLAIN, PLAIN),
    "falcon": both(PLAIN, PLAIN),
    "deepseek_v3": both(PLAIN, PLAIN),
    "mistral": both(WINDOW, WINDOW),
    "cohere2": both(WINDOW, PLAIN),
    "gemma3_text": both(WINDOW, PLAIN),
    "llama4_text": both(CHUNK, PLAIN),
    "gptj": {"eager": [PLAIN, PLAIN]},
    "gemma2": {"eager": [f"{WINDOW}, softcap 50", f"{PLAIN}, softcap 50"]},
    "gpt_oss": {"eager": [f"{WINDOW}, sink", f"{PLAIN}, sink"]},
    "bloom": {"eager": [f"{PLAIN}, bias from a tensor"] * 2},
    "mpt": {"eager": [f"{PLAIN}, position bias linear in the distance"] * 2},
    # Its masks are buffers of the model.
    "gpt_neo": {"eager": ["causal & given as a tensor & padding", "causal & padding & given as a tensor"]},
    "granite_swa": {"eager": None},
    "dots3_note_text": {"sdpa": None, "eager": None},
}
"""Type, implementation: the masks and scores in words, an attention each, all of them rewritten. None: only what holds
for every type."""

CASES = [(model_type, implementation) for model_type, expected in EXPECTED.items() for implementation in expected]


@pytest.fixture(scope="module", autouse=True)
def _transformers() -> None:
    pytest.importorskip("transformers")


def test_every_softmax_between_products_is_counted() -> None:
    """The count that recognition is held against does not come from the backend's patterns."""
    chains: list[Chain] = []

    def capture(module: torch.fx.GraphModule, _: Any) -> Any:
        chains.extend(handwritten(module.graph))
        return module.forward

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        scores = torch.tanh(q @ k.transpose(-1, -2) / 3)
        routed = torch.softmax(torch.nn.functional.linear(q, gate), -1)
        return torch.cat([scores, scores[..., :1]], -1).float().softmax(-1)[..., :-1] @ v * routed

    torch.compile(attention, backend=capture)(*torch.randn(3, 2, 4, 20, 8), torch.randn(8, 8))
    assert [c.signature.split(" -> ")[0].partition("(")[0] for c in chains] == ["matmul"]
    assert "tanh" in chains[0].signature


@pytest.mark.parametrize(("model_type", "implementation"), CASES, ids=["-".join(c) for c in CASES])
def test_a_type(model_type: str, implementation: str) -> None:
    record = zoo.measure(model_type, implementation)
    assert record["status"] == "ok", record["error"]
    assert record["golden"] == "fp64"
    assert not record["chaotic"]
    assert record["verdict"] == "equal", {k: record[k] for k in ("eager_error", "stem_error", "ratio", "where")}
    assert record["graphs"] == record["plain_graphs"] == 1
    assert record["quadratic"] == 0
    assert not record["missed"], record["missed"][0]["listing"]
    expected = EXPECTED[model_type][implementation]
    if expected is not None:
        assert not record["rejected"]
        assert record["masks"] == expected
        assert record["square"] == 0


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_that_see_no_key_give_what_eager_gives(implementation: str) -> None:
    """blt lets padded tokens reach real ones, and its masks written out make them the mean of all values, SDPA's 0."""
    record = zoo.measure("blt", implementation)
    assert record["verdict"] == "equal", {k: record[k] for k in ("eager_error", "stem_error", "ratio", "where")}
    assert record["rewritten"] == record["found"] == 10
    assert record["graphs"] == record["plain_graphs"]


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
    with torch.no_grad():
        eager, golden = zoo_models.logits(model, given), zoo.golden(model, given)
        flipped = given["attention_mask"].clone()
        flipped[0, zoo_models.PADDING] = 0
        wrong = zoo_models.logits(model, given | {"attention_mask": flipped})
    assert golden is not None
    assert zoo.compare({}, eager + 1e-7, eager, golden, real)["verdict"] == "equal"
    assert zoo.compare({}, wrong, eager, golden, real)["verdict"] == "differs"
