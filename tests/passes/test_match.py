"""Matching: every pattern fires on its examples, not on its near misses, and grouped keys are found behind their
repetition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stem_compile.config import StemConfig
from stem_compile.passes import match as matching
from stem_compile.passes import pipeline
from stem_compile.passes.graph import normalize
from stem_compile.passes.graph.sites import AttentionSite, Rejected
from stem_compile.passes.graph.values import value
from stem_compile.reasons import Reason
from stem_compile.testing.tolerances import CLOSE_SHORT
from tests.numerics import assert_close
from tests.passes.capture import graph_of, rewritten

EXAMPLES = [(kind, name, *case) for kind, p in matching.PATTERNS.members() for name, case in p.examples().items()]
NEAR_MISSES = [(kind, name, *case) for kind, p in matching.PATTERNS.members() for name, case in p.near_misses().items()]


@pytest.mark.parametrize(
    ("pattern", "name", "function", "inputs"), EXAMPLES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_examples_are_rewritten_and_right(pattern: str, name: str, function: Callable[..., Any], inputs: Any) -> None:
    result, out = rewritten(function, inputs)
    assert len(result.sites) == len(result.attentions) == 1
    assert_close(out, function(*inputs))


@pytest.mark.parametrize(
    ("pattern", "name", "function", "inputs", "reason"), NEAR_MISSES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_near_misses_are_rejected_and_untouched(
    pattern: str, name: str, function: Callable[..., Any], inputs: Any, reason: Reason
) -> None:
    module = graph_of(function, inputs)
    before = module.graph.python_code("self").src
    result = pipeline.run(module, StemConfig(min_length=0, verify=True))
    assert [h.reason for h in result.attentions if isinstance(h, Rejected)] == [reason]
    assert reason.remedy in result.attentions[0].words  # type: ignore[union-attr]
    assert module.graph.python_code("self").src == before


REPEATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transformers": lambda x: (
        x[:, :, None, :, :]
        .expand(x.shape[0], 2, 3, x.shape[2], x.shape[3])
        .reshape(x.shape[0], 6, x.shape[2], x.shape[3])
    ),
    "unsqueeze": lambda x: x.unsqueeze(2).expand(-1, -1, 3, -1, -1).reshape(x.shape[0], 6, x.shape[2], x.shape[3]),
    "repeat_interleave": lambda x: x.repeat_interleave(3, dim=1),
    "contiguous": lambda x: x.repeat_interleave(3, 1).contiguous(),
}
NOT_REPEATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "repeat tiles": lambda x: x.repeat(1, 3, 1, 1),
    "expanded in front": lambda x: (
        x[:, None].expand(x.shape[0], 3, 2, x.shape[2], x.shape[3]).reshape(x.shape[0], 6, x.shape[2], x.shape[3])
    ),
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
    assert_close(out, model(*inputs))


def test_a_repetition_whose_source_is_overwritten_is_kept() -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k = k.clone()
        wide = k.repeat_interleave(3, 1)
        k.zero_()
        return F.scaled_dot_product_attention(q, wide, v.repeat_interleave(3, 1), is_causal=True)

    inputs = (torch.randn(1, 6, 50, 16), torch.randn(1, 2, 50, 16), torch.randn(1, 2, 50, 16))
    result, out = rewritten(model, inputs)
    assert value(result.sites[0].k).shape[1] == 6
    assert_close(out, model(*inputs))


def _autocast(attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return attend(q, k, v)

    return model


def _by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) * 0.25
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf).softmax(-1) @ v


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, double(k[:, :1]), double(v[:, :1]), is_causal=True)


def double(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, 1)


# name: (model, dtype of the inputs, dtype that the attention is computed in)
CASTS: dict[str, tuple[Callable[..., torch.Tensor], torch.dtype, torch.dtype]] = {
    "autocast, SDPA": (_autocast(_sdpa), torch.float32, torch.bfloat16),
    "autocast, by hand": (_autocast(_by_hand), torch.float32, torch.bfloat16),
    "autocast, of half precision": (_autocast(_sdpa), torch.bfloat16, torch.bfloat16),
    "wanted in fp32": (lambda q, k, v: _by_hand(q.float(), k.float(), v.float()), torch.bfloat16, torch.float32),
    "wanted in fp32 for more": (
        lambda q, k, v: _by_hand(q.float(), k.float(), v.float()) + 1.0,
        torch.float16,
        torch.float32,
    ),
    "computed in fp32": (
        lambda q, k, v: _by_hand(q.float(), k.float(), v.float()).transpose(1, 2).to(q.dtype),
        torch.bfloat16,
        torch.bfloat16,
    ),
    "keys not cast": (
        lambda q, k, v: _by_hand(q.float(), k.float() + 0.0, v.float()).to(q.dtype),
        torch.bfloat16,
        torch.float32,
    ),
}


@pytest.mark.parametrize("name", CASTS)
def test_an_attention_keeps_the_dtypes_that_the_graph_gives_it(name: str) -> None:
    model, given, computed = CASTS[name]
    inputs = tuple(torch.randn(1, 2, 50, 16, generator=torch.Generator().manual_seed(i)).to(given) for i in range(3))
    result, out = rewritten(model, inputs)
    assert [value(site.q).dtype for site in result.sites] == [computed]
    expected = model(*inputs)
    assert_close(out, expected, CLOSE_SHORT if expected.dtype == torch.float32 else None)


def _no_grad(attend: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def model(*inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return attend(*inputs)

    return model


@pytest.mark.parametrize("name", ["a learned bias", "a learned temperature", "keys", "none inside"])
def test_gradients_are_those_of_the_result(name: str) -> None:
    """Whatever they come through, and as the region of the graph says, not the moment of compiling."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, learned: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-1, -2) * 0.25
        scores = scores * learned.exp() if "temperature" in name else scores + learned if "bias" in name else scores
        return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf).softmax(-1) @ v

    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    learned = torch.zeros(2, 40, 40) if "bias" in name else torch.zeros(2, 1, 1)
    inputs = (q, k.requires_grad_(name in ("keys", "none inside")), v, learned.requires_grad_("learned" in name))
    result, out = rewritten(attend if name != "none inside" else _no_grad(attend), inputs)
    if name == "none inside":
        assert len(result.sites) == 1
        assert not out.requires_grad
    else:
        assert [h.reason for h in result.attentions if isinstance(h, Rejected)] == [Reason.GRADIENT]
        assert out.requires_grad


def test_gradients_are_refused_and_flow() -> None:
    model = torch.nn.Linear(16, 16)

    def attend(x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(model(x), x, x, is_causal=True)

    module = graph_of(attend, (torch.randn(1, 2, 40, 16),))
    hits = matching.match(module.graph)
    assert [h.reason for h in hits if isinstance(h, Rejected)] == [Reason.GRADIENT]


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((2, 40, 16), torch.float32, Reason.SHAPE),
        ((1, 2, 40, 16), torch.float64, Reason.DTYPE),
        ((1, 2, 20, 1032), torch.float32, Reason.HEAD_DIM),
    ],
)
def test_what_no_kernel_takes_is_refused(shape: tuple[int, ...], dtype: torch.dtype, reason: Reason) -> None:
    x = torch.randn(shape, dtype=dtype)
    result, _ = rewritten(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (x, x, x))
    assert [h.reason for h in result.attentions if isinstance(h, Rejected)] == [reason]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"min_length": 41}, Reason.SHORT),
        ({"dense_layers": 1}, Reason.DENSE_LAYER),
        ({"dense_layers": (0,)}, Reason.DENSE_LAYER),
        ({"fuel": 0}, Reason.FUEL),
    ],
)
def test_options_keep_attentions_dense(options: dict[str, Any], reason: Reason) -> None:
    x = torch.randn(1, 2, 40, 16)
    result, _ = rewritten(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (x, x, x), **options)
    assert [h.reason for h in result.attentions if isinstance(h, Rejected)] == [reason]


def test_a_prompt_without_tokens_stays_as_it_is() -> None:
    x = torch.randn(1, 2, 0, 16)
    result, out = rewritten(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), (x, x, x))
    assert [h.reason for h in result.attentions if isinstance(h, Rejected)] == [Reason.SHORT]
    assert out.shape == x.shape


def test_decoding_is_refused() -> None:
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 40, 16)

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=torch.arange(40)[None, :] <= torch.arange(1)[:, None] + 39
        )

    result, _ = rewritten(model, (q, k, k))
    assert [h.reason for h in result.attentions if isinstance(h, Rejected)] == [Reason.DECODE]


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
    assert [type(h) for h in result.attentions] == [AttentionSite, AttentionSite, Rejected]
    assert [s.index for s in result.sites] == [0, 1]
