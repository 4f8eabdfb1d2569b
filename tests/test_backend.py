"""The backend as users meet it: failures leave the graph as it was, fallback="error" names the site, graphs without
attention pass untouched."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stem_compile import backend
from stem_compile.backend import StemError
from stem_compile.passes import pipeline
from stem_compile.passes.graph.sites import Rejected
from stem_compile.reasons import Reason, StemWarning
from tests.numerics import assert_close

OPTIONS: dict[str, Any] = {"min_length": 0, "budget": 1.0, "inner": "eager"}


class Block(torch.nn.Module):
    """A plain module with one attention."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)
        self.causal = causal

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).reshape(x.shape)


X = torch.randn(2, 100, 32, generator=torch.Generator().manual_seed(0))


def test_a_plain_module_is_rewritten() -> None:
    model, rewrites = Block(), []
    with torch.no_grad(), backend.listen(rewrites.append):
        out = torch.compile(model, backend="stem", options=OPTIONS, fullgraph=True)(X)
        assert_close(out, model(X))
    assert len(rewrites[0].sites) == 1


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dynamic", [None, True])
def test_fused_encoder_layers_are_rewritten(first: bool, dynamic: bool | None) -> None:
    """With dynamic=True Dynamo makes their epsilon an input of the graph."""
    layer, rewrites = torch.nn.TransformerEncoderLayer(32, 2, 48, batch_first=True, norm_first=first).eval(), []
    mask = torch.ones(100, 100, dtype=torch.bool).triu(1)
    with torch.no_grad(), backend.listen(rewrites.append):
        out = torch.compile(layer, backend="stem", options=OPTIONS, fullgraph=True, dynamic=dynamic)(X, src_mask=mask)
        assert_close(out, layer(X, src_mask=mask))
    assert len(rewrites[0].sites) == 1


def test_training_goes_on_dense() -> None:
    model, rewrites = Block(), []
    with backend.listen(rewrites.append):
        torch.compile(model, backend="stem", options=OPTIONS, fullgraph=True)(X).sum().backward()
    assert [h.reason for h in rewrites[0].attentions] == [Reason.GRADIENT]
    assert model.qkv.weight.grad is not None


@pytest.mark.parametrize("step", ["match", "analyze_masks", "insert_selection", "lower", "cleanup"])
def test_our_own_failure_leaves_the_graph_as_it_was(
    step: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("planted")

    monkeypatch.setattr(pipeline, step, broken)
    model, rewrites = Block(), []
    caplog.set_level("DEBUG", "stem_compile")
    with torch.no_grad(), backend.listen(rewrites.append), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = torch.compile(model, backend="stem", options=OPTIONS, fullgraph=True)(X)
        assert torch.equal(out, model(X))
    told = [w for w in caught if issubclass(w.category, StemWarning)]
    assert len(told) == 1
    assert "planted" in str(told[0].message)
    # The traceback is for those who ask: see the warning.
    assert [r.levelname for r in caplog.records if r.name == "stem_compile.passes.pipeline" and r.exc_info] == ["DEBUG"]
    assert [h.reason for h in rewrites[0].attentions] == [Reason.INTERNAL]
    assert not [n for n in rewrites[0].module.graph.nodes if "stem" in str(n.target)]


def test_fallback_error_names_the_site_and_the_way_out() -> None:
    with torch.no_grad(), pytest.raises(StemError, match=r"no causal mask.*budgets"):
        torch.compile(Block(causal=False), backend="stem", options={**OPTIONS, "fallback": "error"})(X)


def test_fallback_error_lets_pass_what_was_asked_for() -> None:
    with torch.no_grad():
        torch.compile(Block(), backend="stem", options={**OPTIONS, "fallback": "error", "min_length": 1000})(X)


def test_a_graph_without_attention_is_untouched() -> None:
    rewrites: list[Any] = []
    linear = torch.nn.Linear(32, 4)
    with backend.listen(rewrites.append):
        out = torch.compile(linear, backend="stem", options={"inner": "eager"})(X)
    assert torch.equal(out, linear(X))
    assert rewrites[0].attentions == []
    assert not rewrites[0].changed


def test_a_rejected_attention_is_bitwise_what_it_was() -> None:
    model, rewrites = Block(causal=False), []
    with torch.no_grad(), backend.listen(rewrites.append):
        assert torch.equal(torch.compile(model, backend="stem", options=OPTIONS)(X), model(X))
    assert isinstance(rewrites[0].attentions[0], Rejected)


def test_fuel_bisects() -> None:
    model = torch.nn.Sequential(Block(), Block(), Block())
    for fuel in range(4):
        torch._dynamo.reset()
        rewrites: list[Any] = []
        with torch.no_grad(), backend.listen(rewrites.append):
            torch.compile(model, backend="stem", options={**OPTIONS, "fuel": fuel})(X)
        assert len(rewrites[0].sites) == fuel


@pytest.mark.parametrize("shape", [(2, 0, 32), (0, 100, 32)])
def test_nothing_in_is_nothing_out(shape: tuple[int, ...]) -> None:
    with torch.no_grad():
        out = torch.compile(Block(), backend="stem", options={**OPTIONS, "budget": 0.5})(torch.randn(shape))
    assert out.shape == shape


def test_views_behind_an_attention_keep_working() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True).view(-1)

    x = torch.randn(1, 2, 50, 16)
    assert_close(torch.compile(model, backend="stem", options=OPTIONS)(x), model(x))


@pytest.mark.slow
def test_mode_reaches_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import compile_fx

    patches: list[Any] = []
    monkeypatch.setattr(
        compile_fx,
        "compile_fx",
        lambda module, inputs, config_patches=None: patches.append(config_patches) or module.forward,
    )
    with torch.no_grad():
        torch.compile(Block(), backend="stem", mode="max-autotune-no-cudagraphs")(X)
        torch._dynamo.reset()
        torch.compile(Block(), backend="stem", options={"mode": "max-autotune-no-cudagraphs"})(X)
    assert [s["max_autotune"] for s in patches] == [True, True]
