"""Compiled models on a GPU: CUDA graphs, kernels compiled once, the crossover as measured."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import stem_compile
from stem_compile.kernels import crossover

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


class Layers(torch.nn.Module):
    """Attention blocks and nothing else."""

    def __init__(self, layers: int, heads: int = 4, key_heads: int = 2, dim: int = 64) -> None:
        super().__init__()
        self.heads, self.key_heads, self.dim = heads, key_heads, dim
        self.qkv = torch.nn.ModuleList(
            torch.nn.Linear(heads * dim, (heads + 2 * key_heads) * dim) for _ in range(layers)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for project in self.qkv:
            parts = (
                project(x)
                .unflatten(-1, (-1, self.dim))
                .transpose(1, 2)
                .split((self.heads, self.key_heads, self.key_heads), 1)
            )
            x = x + F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
        return x


def model(layers: int, **sizes: int) -> tuple[Layers, int]:
    """(model, width of its input)."""
    torch.manual_seed(0)
    layers_model = Layers(layers, **sizes).eval().to("cuda", torch.bfloat16)
    return layers_model, layers_model.heads * layers_model.dim


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_cuda_graphs_at_fixed_length(pooling: str) -> None:
    layers_model, width = model(2)
    options = {"budget": 0.25, "min_length": 0, "pooling": pooling}
    with torch.inference_mode():
        plain = torch.compile(layers_model, backend="stem", options=options)
        inputs = [torch.randn(1, 4096, width, device="cuda", dtype=torch.bfloat16) for _ in range(5)]
        expected = [plain(x).clone() for x in inputs]
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        captured = torch.compile(layers_model, backend="stem", options={**options, "mode": "reduce-overhead"})
        for x, want in zip(inputs, expected, strict=True):
            assert torch.equal(captured(x).clone(), want)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, torch.inference_mode():
        captured(inputs[0])
        torch.cuda.synchronize()
    assert any("GraphLaunch" in event.key for event in profile.key_averages()), [e.key for e in profile.key_averages()]


def test_many_layers_compile_each_kernel_once() -> None:
    import triton

    compiled: collections.Counter[Any] = collections.Counter()

    def count(*, key: str, fn: Any, **_: Any) -> None:
        if str(fn.module).startswith("stem_compile_generated"):
            compiled[fn.name, key] += 1

    layers_model, width = model(32, heads=2, key_heads=1)
    x = torch.randn(1, 3000, width, device="cuda", dtype=torch.bfloat16)
    before, triton.knobs.runtime.jit_post_compile_hook = triton.knobs.runtime.jit_post_compile_hook, count
    try:
        with torch.inference_mode():
            run = torch.compile(
                layers_model, backend="stem", options={"budget": 0.2, "min_length": 0, "inner": "eager", "mu": 0.61}
            )
            run(x)
            first = sum(compiled.values())
            run(x)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before
    assert sum(compiled.values()) == first
    assert set(compiled.values()) <= {1}
    # Means and value terms, masses, shares of the heads, lists, attention, attention of marked rows.
    assert first <= 6, compiled


def test_the_crossover_is_measured_and_obeyed(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("STEM_COMPILE_CACHE", str(tmp_path))
    crossover._crossover.cache_clear()
    layers_model, width = model(2, heads=32, key_heads=8, dim=64)
    with torch.inference_mode():
        for length in (2048, 16384):
            told = stem_compile.explain(layers_model, {"budget": 0.1})(
                torch.randn(1, length, width, device="cuda", dtype=torch.bfloat16)
            )
            reasons = {s["reason"] for s in told.sites}
            assert len(told.sites) == 2
            assert reasons in ({None}, {"slower"})
        assert reasons == {None}, told  # a tenth of 16,384 tokens: ten times less work
    assert len(list(tmp_path.glob("crossover_*.json"))) == 1
    crossover._crossover.cache_clear()
