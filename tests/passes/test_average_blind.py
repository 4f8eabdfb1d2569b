"""Rows that see no key give what eager attention gives: the mean of all values under finite scores for hidden keys, and
nothing changes under -inf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import BackendCompilerFailed

from stem_compile import ops
from stem_compile.kernels import launch
from stem_compile.passes.pipeline import Rewrite
from stem_compile.testing import numerics
from tests.numerics import assert_close
from tests.passes.capture import rewritten

Tensor = torch.Tensor
LENGTH, PADDING = 70, 23


def lowest(x: Tensor) -> float:
    return torch.finfo(x.dtype).min


def dtype_zeros(s: Tensor, hidden: Tensor) -> Tensor:
    return torch.zeros(hidden.shape, dtype=s.dtype)


# Ways to hide keys (s: scores, m: True is visible) under which all scores of a row without a key are equal and finite.
EVEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "added": lambda s, m: s + torch.where(m, 0.0, lowest(s)).to(s.dtype),
    "multiplied": lambda s, m: s + (1.0 - m.to(s.dtype)) * lowest(s),
    "filled": lambda s, m: s.masked_fill(~m, lowest(s)),
    "filled, not deep": lambda s, m: s.masked_fill(~m, -1e4),
    "where": lambda s, m: (
        torch.where(m, s, torch.tensor(-1e9, dtype=s.dtype)) if s.dtype != torch.float16 else s.masked_fill(~m, -6e4)
    ),
    "chosen and multiplied": lambda s, m: s * m.to(s.dtype) - 1e4 * (1 - m.to(s.dtype)),
    "twice, then clamped": lambda s, m: (
        (s + torch.where(m, 0.0, lowest(s)).to(s.dtype)).masked_fill(~m, lowest(s)).clamp(min=lowest(s))
    ),
    "in place": lambda s, m: s.add_(dtype_zeros(s, m).masked_fill_(~m, lowest(s))),
}
# Ways under which there is none.
NOTHING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "filled with -inf": lambda s, m: s.masked_fill(~m, -torch.inf),
    "added -inf": lambda s, m: s + torch.where(m, 0.0, -torch.inf),
    "lowest twice": lambda s, m: s + torch.where(m, 0.0, lowest(s)) + torch.where(m, 0.0, lowest(s)),
    "beyond fp32": lambda s, m: s + torch.where(m, torch.tensor(0.0), torch.tensor(-1e300)),
}


def apart(m: Tensor) -> tuple[Tensor, Tensor]:
    """(causal, padding) whose conjunction is m."""
    return torch.ones(m.shape[-2:], dtype=torch.bool).tril(), m[:, :, -1:, :]


# Ways under which they differ: scores that stay what they were, or that only some reasons hide for good.
UNEVEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "not deep": lambda s, m: s + torch.where(m, 0.0, -1e4).to(s.dtype),
    "multiplied, not deep": lambda s, m: s + (1.0 - m.to(s.dtype)) * -1e4,
    "subtracted": lambda s, m: s - torch.where(m, 0.0, 9000.0).to(s.dtype),
    "filled by position": lambda s, m: s.masked_fill(~m, -1e4) + 0.1 * torch.arange(LENGTH).to(s.dtype),
    "two levels": lambda s, m: s.masked_fill(~apart(m)[0], -1e4).masked_fill(~apart(m)[1], -2e4),
    "rounded after": lambda s, m: (s.float() + torch.where(m, 0.0, -1e4)).to(torch.bfloat16).to(s.dtype),
    "lowest by each": lambda s, m: (
        torch.where(apart(m)[0], s, lowest(s)) + torch.where(apart(m)[1], 0.0, lowest(s)).to(s.dtype)
    ),
    "-inf by place, a number by padding": lambda s, m: (
        s.masked_fill(~apart(m)[0], -torch.inf) + torch.where(apart(m)[1], 0.0, -1e4).to(s.dtype)
    ),
}


def by_hand(hide: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        rows = torch.arange(q.shape[2])
        mask = (rows[None, :] <= rows[:, None]) & padding[:, None, None, :]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = hide(q @ k.transpose(-1, -2) * 0.25, mask)
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

    return attention


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q of 4 heads, k and v of 2, and left padding in the first row."""
    torch.manual_seed(0)
    padding = torch.ones(2, LENGTH, dtype=torch.bool)
    padding[0, :PADDING] = False
    return *(torch.randn(2, heads, LENGTH, 16).to(dtype) for heads in (4, 2, 2)), padding


def count(rewrite: Rewrite, target: Any) -> int:
    return sum(n.target is target for n in rewrite.module.graph.nodes)


def golden(given: tuple[Tensor, ...]) -> Tensor:
    """The same attention in fp64, hidden keys filled in."""
    return by_hand(lambda s, m: s.masked_fill(~m, -1e30))(*(x.double() if x.is_floating_point() else x for x in given))


def equal(out: Tensor, eager: Tensor, exact: Tensor) -> None:
    """By the tolerance: ours against fp64, beside eager's own error."""
    assert numerics.gap(out, exact, numerics.tolerance(eager, exact, eager.dtype)).ok


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", EVEN)
def test_every_row_equals_eager(name: str, dtype: torch.dtype, dynamic: bool) -> None:
    function, given = by_hand(EVEN[name]), inputs(dtype)
    result, out = rewritten(function, given, dynamic=dynamic)
    assert [s.words for s in result.sites] == ["causal & padding"]
    eager = function(*given)
    mean = given[2][0].float().mean(1).repeat_interleave(2, 0)
    assert (eager[0, :, 0].float() - mean).abs().max() < 1e-2
    equal(out, eager, golden(given))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", UNEVEN)
def test_rows_weigh_hidden_keys_by_their_scores(name: str, dtype: torch.dtype, dynamic: bool) -> None:
    function, given = by_hand(UNEVEN[name]), inputs(dtype)
    result, out = rewritten(function, given, dynamic=dynamic)
    assert len(result.sites) == 1
    eager = function(*given)
    assert_close(out, eager, computed=torch.bfloat16 if name == "rounded after" else dtype)


@pytest.mark.parametrize("name", NOTHING)
def test_a_row_of_nothing_but_infinity_stays_0(name: str) -> None:
    function, given = by_hand(NOTHING[name]), inputs()
    result, out = rewritten(function, given)
    assert count(result, ops.SPARSE_ATTENTION) == 1
    assert count(result, ops.BLIND_ROWS) == count(result, torch.where) == 0
    assert (out[0, :, :PADDING] == 0).all()
    assert_close(out[0, :, PADDING:], function(*given)[0, :, PADDING:])


def test_a_row_weighs_only_keys_that_are_hidden_once() -> None:
    """By its place and by its padding: -inf."""

    def attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        rows = torch.arange(q.shape[2])
        scores = torch.where(rows[None, :] <= rows[:, None], q @ k.mT, lowest(q))
        return (scores + torch.where(padding[:, None, None, :], 0.0, lowest(q))).softmax(-1) @ v

    q, _, _, padding = inputs()
    result, out = rewritten(attention, (q, q, q, padding))
    assert [s.words for s in result.sites] == ["causal & padding"]
    assert count(result, ops.BLIND_ATTENTION) == 1
    assert_close(out, attention(q, q, q, padding))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_padding_mask_of_numbers_multiplied(dynamic: bool) -> None:
    """The older spelling: causal times padding, both as numbers."""

    def attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        rows = torch.arange(q.shape[2])
        mask = (rows[None, :] <= rows[:, None]).to(q.dtype)[None, None] * padding[:, None, None, :]
        return (q @ k.mT * 0.25 + (1.0 - mask) * lowest(q)).softmax(-1) @ v

    q, _, _, padding = inputs()
    given = (q, q, q, padding.float())
    result, out = rewritten(attention, given, dynamic=dynamic)
    assert count(result, ops.BLIND_ROWS) == 1
    assert_close(out, attention(*given))


def test_a_bias_chosen_by_distance_is_rounded_away() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        rows = torch.arange(q.shape[2])
        mask = (rows[None, :] <= rows[:, None]) & padding[:, None, None, :]
        near = torch.where(rows[:, None] - rows[None, :] < 5, 0.5, -0.5)
        return (q @ k.mT * 0.25 + near + torch.where(mask, 0.0, lowest(q))).softmax(-1) @ v

    q, _, _, padding = inputs()
    result, out = rewritten(attention, (q, q, q, padding))
    assert count(result, ops.BLIND_ROWS) == 1
    assert_close(out, attention(q, q, q, padding))


def test_a_mask_that_leaves_no_row_blind_costs_nothing() -> None:
    def causal(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        rows = torch.arange(q.shape[2])
        mask = (rows[None, :] <= rows[:, None]) & (rows[None, :] > rows[:, None] - 9)
        return (q @ k.mT + torch.where(mask, 0.0, lowest(q))).softmax(-1) @ v

    q, _, _, padding = inputs()
    for dynamic in (False, True):
        result, out = rewritten(causal, (q, q, q, padding), dynamic=dynamic)
        assert len(result.sites) == 1
        assert count(result, ops.BLIND_ROWS) == count(result, torch.where) == 0
        assert_close(out, causal(q, q, q, padding))


def test_a_prefix_leaves_no_row_blind() -> None:
    def chunk(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before = k.shape[2] - q.shape[2]
        mask = torch.arange(k.shape[2])[None, :] <= torch.arange(q.shape[2])[:, None] + before
        return (q @ k.mT + torch.where(mask, 0.0, lowest(q))).softmax(-1) @ v

    k = torch.randn(1, 2, LENGTH, 16)
    for dynamic in (False, True):
        result, _ = rewritten(chunk, (k[:, :, 30:].contiguous(), k, k), dynamic=dynamic)
        assert len(result.sites) == 1
        assert count(result, ops.BLIND_ROWS) == 0


def test_layers_ask_once() -> None:
    attention = by_hand(EVEN["added"])

    def model(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        for _ in range(3):
            q = q + attention(q, k, v, padding)
        return q

    given = inputs()
    result, out = rewritten(model, given)
    assert [count(result, t) for t in (ops.SPARSE_ATTENTION, ops.BLIND_ROWS, torch.where)] == [3, 1, 3]
    assert_close(out, model(*given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_finite_mask_given_to_sdpa(dtype: torch.dtype) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        rows = torch.arange(q.shape[2])
        mask = (rows[None, :] <= rows[:, None]) & padding[:, None, None, :]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=torch.where(mask, 0.0, lowest(q)).to(q.dtype), scale=0.25, enable_gqa=True
        )

    given = inputs(dtype)
    result, out = rewritten(attention, given)
    assert count(result, ops.BLIND_ROWS) == 1
    equal(out, attention(*given), golden(given))


@pytest.mark.parametrize("fill", ["lowest", "-inf"])
def test_a_mask_from_outside(fill: str) -> None:
    """A float mask [B, 1, N, N] that no graph explains: rows are looked up in it, and only its lowest entries
    are even."""

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT * 0.25 + mask).softmax(-1) @ v

    q, _, _, padding = inputs()
    shown = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & padding[:, None, None, :]
    mask = torch.where(shown, 0.0, lowest(q) if fill == "lowest" else -torch.inf)
    result, out = rewritten(attention, (q, q, q, mask))
    assert len(result.sites) == 1
    eager = attention(q, q, q, mask)
    assert_close(out, eager if fill == "lowest" else eager.nan_to_num(0.0))


def test_a_bias_of_integers_has_no_lowest_entry_that_means_hidden() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT * 0.25 + bias).softmax(-1) @ v

    q, _, _, padding = inputs()
    shown = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & padding[:, None, None, :]
    bias = torch.where(shown, 0, -1_000_000_000)
    result, out = rewritten(attention, (q, q, q, bias))
    assert len(result.sites) == 1
    assert_close(out, attention(q, q, q, bias))


def test_a_sink_takes_what_hidden_keys_had() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, sink: Tensor) -> Tensor:
        rows = torch.arange(q.shape[2])
        mask = (rows[None, :] <= rows[:, None]) & padding[:, None, None, :]
        scores = q @ k.mT + torch.where(mask, 0.0, lowest(q))
        joined = torch.cat([scores, sink.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)], -1)
        return joined.softmax(-1)[..., :-1] @ v

    q, _, _, padding = inputs()
    given = (q, q, q, padding, torch.randn(4))
    result, out = rewritten(attention, given)
    assert count(result, ops.BLIND_ROWS) == 0
    assert_close(out, attention(*given))


def test_weights_set_to_0_stay_0() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        rows = torch.arange(q.shape[2])
        hidden = ~((rows[None, :] <= rows[:, None]) & padding[:, None, None, :])
        return (q @ k.mT).masked_fill(hidden, lowest(q)).softmax(-1).masked_fill(hidden, 0.0) @ v

    q, _, _, padding = inputs()
    result, out = rewritten(attention, (q, q, q, padding))
    assert count(result, ops.BLIND_ROWS) == 0
    assert_close(out, attention(q, q, q, padding))


def test_a_bias_of_positions_is_rounded_away_only_by_the_lowest() -> None:
    def attention(fill: float) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, slopes: Tensor) -> Tensor:
            rows = torch.arange(q.shape[2])
            mask = (rows[None, :] <= rows[:, None]) & padding[:, None, None, :]
            bias = slopes[:, None, None] * (rows[None, :] - rows[:, None])
            return (q @ k.mT + bias + torch.where(mask, 0.0, fill)).softmax(-1) @ v

        return run

    q, _, _, padding = inputs()
    given = (q, q, q, padding, torch.tensor([0.5, 0.25, 0.1, 0.01]))
    result, out = rewritten(attention(lowest(q)), given)
    assert count(result, ops.BLIND_ROWS) == 1
    assert_close(out, attention(lowest(q))(*given))
    result, out = rewritten(attention(-1e9), given)
    assert count(result, ops.BLIND_ATTENTION) == 1
    assert_close(out, attention(-1e9)(*given))


def test_every_kernel_and_budget_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that see no key are no business of a kernel: the reference and the CPU's, dense rows and selected ones give
    the same."""
    function, given = by_hand(EVEN["added"]), inputs()
    options = {"block_size": 64, "key_block_size": 32, "sink_blocks": 1, "local_blocks": 1}
    outs = [rewritten(function, given, budget=budget, **options)[1] for budget in (1.0, 0.5)]
    monkeypatch.setattr(launch, "target", lambda _: None)
    outs += [rewritten(function, given, budget=budget, **options)[1] for budget in (1.0, 0.5)]
    eager = function(*given)
    for out in outs:
        assert_close(out[0, :, :PADDING], eager[0, :, :PADDING])


def test_verify_catches_a_site_that_forgot(monkeypatch: pytest.MonkeyPatch) -> None:
    from stem_compile.passes import insert_selection

    monkeypatch.setattr(insert_selection, "average_blind", lambda attention, site, blind: attention)
    with pytest.raises(BackendCompilerFailed, match="see no key"):
        rewritten(by_hand(EVEN["added"]), inputs())
