"""Matching: every pattern fires on its examples, not on its near misses, and grouped keys are found behind their repetition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stem_compile.config import StemConfig
from stem_compile.passes import match as matching
from stem_compile.passes import normalize, pipeline
from stem_compile.sites import AttentionSite, Reason, Rejected, value
from tests.passes.capture import graph_of, rewritten

EXAMPLES = [(p.__name__.rpartition(".")[2], name, *case) for p in matching.patterns() for name, case in p.examples().items()]
NEAR_MISSES = [(p.__name__.rpartition(".")[2], name, *case) for p in matching.patterns() for name, case in p.near_misses().items()]


@pytest.mark.parametrize(("pattern", "name", "function", "inputs"), EXAMPLES, ids=lambda x: x if isinstance(x, str) else "")
def test_examples_are_rewritten_and_right(pattern: str, name: str, function: Callable[..., Any], inputs: Any) -> None:
    result, out = rewritten(function, inputs)
    assert len(result.sites) == len(result.found) == 1
    torch.testing.assert_close(out, function(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("pattern", "name", "function", "inputs", "reason"), NEAR_MISSES, ids=lambda x: x if isinstance(x, str) else "")
def test_near_misses_are_rejected_and_untouched(pattern: str, name: str, function: Callable[..., Any], inputs: Any, reason: Reason) -> None:
    module = graph_of(function, inputs)
    before = module.graph.python_code("self").src
    result = pipeline.run(module, StemConfig(min_length=0, verify=True))
    assert [h.reason for h in result.found if isinstance(h, Rejected)] == [reason]
    assert reason.remedy in result.found[0].words  # type: ignore[union-attr]
    assert module.graph.python_code("self").src == before


REPEATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transformers": lambda x: x[:, :, None, :, :].expand(x.shape[0], 2, 3, x.shape[2], x.shape[3]).reshape(x.shape[0], 6, x.shape[2], x.shape[3]),
    "unsqueeze": lambda x: x.unsqueeze(2).expand(-1, -1, 3, -1, -1).reshape(x.shape[0], 6, x.shape[2], x.shape[3]),
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=1),
    "contiguous": lambda x: x.repeat_interleave(3, 1).contiguous(),
}
NOT_REPEATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "repeat tiles": lambda x: x.repeat(1, 3, 1, 1),
    "expanded in front": lambda x: x[:, None].expand(x.shape[0], 3, 2, x.shape[2], x.shape[3]).reshape(x.shape[0], 6, x.shape[2], x.shape[3]),
    "along the length": lambda x: x.repeat_interleave(3, dim=2)[:, :, : x.shape[2]].repeat(1, 3, 1, 1),
}


@pytest.mark.parametrize("name", [*REPEATS, *NOT_REPEATS])
def test_only_a_real_repetition_is_undone(name: str) -> None:
    repeat = (REPEATS | NOT_REPEATS)[name]

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, repeat(k), repeat(v), is_causal=True)

    inputs = (torch.randn(2, 6, 50, 16), torch.randn(2, 2, 50, 16), torch.randn(2, 2, 50, 16))
    result, out = rewritten(model, inputs)
    assert value(result.sites[0].k).shape[1] == (2 if name in REPEATS else 6)
    torch.testing.assert_close(out, model(*inputs), rtol=1e-4, atol=1e-5)


def test_a_repetition_whose_source_is_overwritten_is_kept() -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k = k.clone()
        wide = k.repeat_interleave(3, 1)
        k.zero_()
        return F.scaled_dot_product_attention(q, wide, v.repeat_interleave(3, 1), is_causal=True)

    inputs = (torch.randn(1, 6, 50, 16), torch.randn(1, 2, 50, 16), torch.randn(1, 2, 50, 16))
    result, out = rewritten(model, inputs)
    assert value(result.sites[0].k).shape[1] == 6
    torch.testing.assert_close(out, model(*inputs), rtol=1e-4, atol=1e-5)


def test_gradients_are_refused_and_flow() -> None:
    model = torch.nn.Linear(16, 16)

    def attend(x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(model(x), x, x, is_causal=True)

    module = graph_of(attend, (torch.randn(1, 2, 40, 16),))
    found = matching.match(module.graph)
    assert [h.reason for h in found if isinstance(h, Rejected)] == [Reason.GRADIENT]


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [((2, 40, 16), torch.float32, Reason.SHAPE), ((1, 2, 40, 16), torch.float64, Reason.DTYPE), ((1, 2, 20, 1032), torch.float32, Reason.HEAD_DIM)],
)
def test_what_no_kernel_takes_is_refused(shape: tuple[int, ...], dtype: torch.dtype, reason: Reason) -> None:
    x = torch.randn(shape, dtype=dtype)
    result, _ = rewritten(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (x, x, x))
    assert [h.reason for h in result.found if isinstance(h, Rejected)] == [reason]


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"min_length": 41}, Reason.SHORT), ({"dense_layers": 1}, Reason.DENSE_LAYER), ({"dense_layers": (0,)}, Reason.DENSE_LAYER), ({"fuel": 0}, Reason.FUEL)],
)
def test_options_keep_attentions_dense(options: dict[str, Any], reason: Reason) -> None:
    x = torch.randn(1, 2, 40, 16)
    result, _ = rewritten(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (x, x, x), **options)
    assert [h.reason for h in result.found if isinstance(h, Rejected)] == [reason]


def test_decoding_is_refused() -> None:
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 40, 16)

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.arange(40)[None, :] <= torch.arange(1)[:, None] + 39)

    result, _ = rewritten(model, (q, k, k))
    assert [h.reason for h in result.found if isinstance(h, Rejected)] == [Reason.DECODE]


SPELLINGS: dict[str, Callable[..., Any]] = {
    "function": lambda x: torch.add(x, 1),
    "method": lambda x: x.add(1),
    "operator": lambda x: x + 1,
    "reflected": lambda x: 1 + x,
    "keyword": lambda x: torch.add(input=x, other=1),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_operation_has_one_name(name: str) -> None:
    module = graph_of(SPELLINGS[name], (torch.ones(3),))
    names = [op.name for n in module.graph.nodes if (op := normalize.read(n)) is not None]
    assert names == ["add"]


def test_sites_are_numbered_in_order() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return x

    result, _ = rewritten(model, (torch.randn(1, 2, 40, 16),), fuel=2)
    assert [type(h) for h in result.found] == [AttentionSite, AttentionSite, Rejected]
    assert [s.index for s in result.sites] == [0, 1]
