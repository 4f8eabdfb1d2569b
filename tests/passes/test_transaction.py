"""A site is a transaction: what a pattern, a policy, a target or a step does to one attention costs that one only."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stem_compile import backend
from stem_compile.kernels import launch
from stem_compile.passes import insert_selection, match, pipeline
from stem_compile.passes.graph.sites import AttentionSite
from stem_compile.passes.patterns import sdpa
from stem_compile.passes.pipeline import Rewrite
from stem_compile.passes.reading import interpret
from stem_compile.reasons import Reason, StemWarning
from stem_compile.selection import policies
from tests.numerics import assert_close

OPTIONS: dict[str, Any] = {"min_length": 0, "budget": 1.0, "inner": "eager"}
N = 70


def three(x: torch.Tensor) -> torch.Tensor:
    """Three attentions, told apart by their scales."""
    for scale in (0.1, 0.2, 0.3):
        hidden = torch.full((N, N), -torch.inf).triu(1)
        x = F.scaled_dot_product_attention(x, x, x, attn_mask=hidden + 0.01, scale=scale)
    return x


def compiled(function: Callable[..., Any], *inputs: Any, **options: Any) -> tuple[Any, Rewrite, list[str]]:
    """(output, what was rewritten, warnings of ours); equal to eager whatever was planted."""
    rewrites: list[Rewrite] = []
    torch._dynamo.reset()
    with torch.no_grad(), backend.listen(rewrites.append), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = torch.compile(function, backend="stem", options={**OPTIONS, **options}, fullgraph=True)(*inputs)
        assert_close(out, function(*inputs))
    return out, rewrites[0], [str(w.message) for w in caught if issubclass(w.category, StemWarning)]


def raising(right: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
    """``right``, but for the calls that are to fail."""

    def wrong(*args: Any, **keywords: Any) -> Any:
        if when(*args):
            raise ZeroDivisionError("planted")
        return right(*args, **keywords)

    return wrong


def second(site: Any) -> bool:
    """Whether a site is the second attention of ``three``."""
    return isinstance(site, AttentionSite) and site.scale == 0.2


def plant_pattern(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sdpa, "match", raising(sdpa.match, lambda n: getattr(n, "kwargs", {}).get("scale") == 0.2))


def plant_check(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(match, "_checked", raising(match._checked, second))


def plant_reader(patch: pytest.MonkeyPatch) -> None:
    from stem_compile.passes import analyze_masks

    patch.setattr(analyze_masks, "_read", raising(analyze_masks._read, lambda site, _: second(site)))


def plant_decide(patch: pytest.MonkeyPatch) -> None:
    from stem_compile.passes import decide

    patch.setattr(decide, "_decided", raising(decide._decided, lambda site, _: second(site)))


def plant_insertion(patch: pytest.MonkeyPatch) -> None:
    """Half-way: the scores of the second attention are there, its selection is not."""
    right, calls = insert_selection.call, []

    def wrong(graph: Any, target: Any, arguments: Any, origin: Any) -> Any:
        calls.append(target)
        if "tpd_select" in str(target) and arguments[0].args[6] == 0.2:
            raise ZeroDivisionError("planted")
        return right(graph, target, arguments, origin)

    patch.setattr(insert_selection, "call", wrong)


def plant_target(patch: pytest.MonkeyPatch) -> None:
    right, calls = launch.kernels, []

    def wrong(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise ZeroDivisionError("planted")
        return right(*args)

    patch.setattr(launch, "kernels", wrong)


def plant_cleanup(patch: pytest.MonkeyPatch) -> None:
    right, calls = pipeline.cleanup, []

    def wrong(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise ZeroDivisionError("planted")
        return right(*args)

    patch.setattr(pipeline, "cleanup", wrong)


PLANTS = [
    plant_pattern,
    plant_check,
    plant_reader,
    plant_decide,
    plant_insertion,
    plant_target,
    plant_cleanup,
]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda p: p.__name__)
@pytest.mark.parametrize("verify", [False, True])
def test_a_failure_costs_one_attention(
    plant: Callable[[pytest.MonkeyPatch], None], verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    _, rewrite, told = compiled(three, torch.randn(1, 2, N, 16), verify=verify)
    assert [getattr(hit, "reason", None) for hit in rewrite.attentions] == [None, Reason.INTERNAL, None]
    assert len(told) == 1
    assert "ZeroDivisionError: planted" in told[0]
    assert "1 of 3" in told[0]


@pytest.mark.parametrize("home", ["pipeline", "match"])
def test_without_a_matcher_the_graph_stays_and_says_so(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both bindings of ``match``: the one that the pipeline calls and the function in its own file."""
    planted = raising(match.match, lambda *_: True)
    monkeypatch.setattr(pipeline, "match", planted)
    if home == "match":
        monkeypatch.setattr(match, "match", planted)
    _, rewrite, told = compiled(three, torch.randn(1, 2, N, 16))
    assert [hit.reason for hit in rewrite.rejected] == [Reason.INTERNAL] * 3
    assert len(told) == 1


def test_a_policy_that_raises_leaves_all_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policies.get("stem"), "min_length", raising(lambda *_: 0, lambda *_: True))
    _, rewrite, told = compiled(three, torch.randn(1, 2, N, 16), min_length=None)
    assert [hit.reason for hit in rewrite.rejected] == [Reason.INTERNAL] * 3
    assert len(told) == 1


def test_a_failing_reader_costs_one_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    readers = dict(interpret.readers())
    readers["triu"] = raising(readers["triu"], lambda *_: True)
    monkeypatch.setattr(interpret, "readers", lambda: readers)
    x = torch.randn(1, 2, N, 16)

    def mixed(x: torch.Tensor) -> torch.Tensor:
        hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
        return F.scaled_dot_product_attention(x, x, x, attn_mask=~hidden) + F.scaled_dot_product_attention(
            x, x, x, is_causal=True
        )

    _, rewrite, _ = compiled(mixed, x)
    assert isinstance(rewrite.attentions[1], AttentionSite)


def causal(x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


def by_hand(x: torch.Tensor) -> torch.Tensor:
    n = x.shape[-2]
    return torch.softmax(x @ x.transpose(-1, -2) / 4 + torch.full((n, n), -torch.inf).triu(1), -1) @ x


@pytest.mark.parametrize("attend", [causal, by_hand])
def test_vmap_stays_dense(attend: Callable[..., Any]) -> None:
    _, rewrite, told = compiled(lambda x: torch.vmap(attend)(x) + attend(x[0]), torch.randn(3, 1, 2, N, 16))
    assert [getattr(hit, "reason", None) for hit in rewrite.attentions] == [Reason.TRANSFORM, None]
    assert not told


def test_jvp_stays_dense() -> None:
    x = torch.randn(1, 2, N, 16)
    _, rewrite, _ = compiled(lambda x: torch.func.jvp(by_hand, (x,), (x,)), x)
    assert [hit.reason for hit in rewrite.rejected] == [Reason.TRANSFORM]


@pytest.mark.parametrize("attend", [causal, by_hand])
def test_a_checkpointed_block_is_rewritten(attend: Callable[..., Any]) -> None:
    from torch.utils.checkpoint import checkpoint

    def model(x: torch.Tensor) -> Any:
        return attend(x) + checkpoint(lambda y: attend(y) + 1, x, use_reentrant=False)

    _, rewrite, _ = compiled(model, torch.randn(1, 2, N, 16), verify=True)
    assert [type(hit) for hit in rewrite.attentions] == [AttentionSite] * 2


def test_attention_inside_cond_is_refused_with_a_reason() -> None:
    def model(x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 0, causal, lambda y: y + 1, (x,))

    _, rewrite, _ = compiled(model, torch.randn(1, 2, N, 16))
    assert [(hit.reason, hit.detail) for hit in rewrite.rejected] == [(Reason.REGION, "cond")]


def test_a_graph_that_comes_back_keeps_what_dynamo_wrote_on_it() -> None:
    """Fused layers are written out to be looked at and put back where they stay dense; under symbolic lengths
    AOTAutograd then asks the inputs where they came from."""
    layer = torch.nn.TransformerEncoderLayer(32, 2, 32, batch_first=True, dropout=0.0)
    model = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()

    def causal(x: torch.Tensor) -> torch.Tensor:
        mask = torch.nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return model(x, mask=mask, is_causal=True)  # type: ignore[no-any-return]

    compiled = torch.compile(causal, backend="stem", dynamic=True, options={"budget": 0.5, "inner": "aot_eager"})
    with torch.inference_mode():
        for length in (300, 70):
            x = torch.randn(1, length, 32)
            torch.testing.assert_close(compiled(x), causal(x))
