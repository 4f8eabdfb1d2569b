"""The operators: a kernel that fails is answered by dense attention under the same mask; layouts and heads are as
promised."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import stem_compile
from stem_compile import ops
from stem_compile.kernels import launch, reference
from stem_compile.kernels.targets.cpu import target as cpu
from stem_compile.ops import SparseAttentionArgs
from stem_compile.reasons import KernelWarning
from stem_compile.selection import FULL
from stem_compile.testing.tolerances import CLOSE_SAME, CLOSE_SHORT
from tests.kernels.kernel_cases import MASKS, SCORES, Case
from tests.numerics import assert_close

LENGTH = 300


@pytest.fixture(autouse=True)
def untold() -> None:
    launch._told.clear()


def failing(*_: Any) -> Any:
    raise IndexError("no such block")


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(rows <= rows[:, None]) & (rows % 7 != 3))


def compiled(**options: Any) -> Any:
    torch._dynamo.reset()
    options = {"budget": 0.25, "block_size": 64, "min_length": 1, "inner": "eager", **options}
    return torch.compile(attention, backend="stem", options=options)


@pytest.mark.parametrize("part", ["select", "attend"])
def test_a_kernel_that_fails_is_answered_by_dense_attention(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, part, failing)
    qkv = tuple(torch.randn(2, 4, LENGTH, 16) for _ in range(3))
    run = compiled()
    with torch.no_grad(), pytest.warns(KernelWarning, match=r"kernel 'cpu .*IndexError: no such block") as caught:
        out = run(*qkv)
    assert len(caught) == 1
    torch.testing.assert_close(out, attention(*qkv))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(run(*qkv), attention(*qkv))  # said once


@pytest.mark.parametrize("part", ["select", "attend"])
def test_who_asks_for_errors_gets_them(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, part, failing)
    qkv = tuple(torch.randn(2, 4, LENGTH, 16) for _ in range(3))
    with torch.no_grad(), pytest.raises(IndexError, match="no such block"):
        compiled(fallback="error")(*qkv)


def test_want_of_memory_is_no_failure_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cpu, "attend", full)
    qkv = tuple(torch.randn(2, 4, LENGTH, 16) for _ in range(3))
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        compiled()(*qkv)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", SCORES)
def test_the_answer_is_dense_under_any_mask_and_score(mask: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Case(90, 90, 2, 4, 2, 16, 24, 32, 32, mask=mask, kind=kind).attention()
    expected = reference.sparse_attention(asked, launch.all_blocks(asked))
    monkeypatch.setattr(cpu, "attend", failing)
    lists = asked.selection(*cpu.select(asked, cpu.kernels(asked).select))
    with pytest.warns(KernelWarning):
        out = torch.ops.stem.sparse_attention(*SparseAttentionArgs.for_(asked, lists, "cpu rowwise"))
    assert torch.equal(out, expected)
    assert (launch.all_blocks(asked).counts == FULL).all()


def test_a_target_that_lays_its_result_out_otherwise_is_put_right(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.attend
    monkeypatch.setattr(cpu, "attend", lambda *args: right(*args).contiguous())
    asked = Case(90, 90, 2, 4, 2, 16, 24, 32, 32).attention()
    out = torch.ops.stem.sparse_attention(*SparseAttentionArgs.for_(asked, launch.all_blocks(asked), "cpu gather"))
    assert out.stride() == ops.attention_output(asked.q, asked.v).stride()


@pytest.mark.parametrize(("key_heads", "value_heads"), [(1, 4), (4, 1), (1, 2), (2, 1), (2, 4), (4, 2), (1, 1)])
@pytest.mark.parametrize("spelling", ["sdpa", "by hand"])
@pytest.mark.parametrize("budget", [1.0, 0.3])
def test_key_heads_and_value_heads_that_differ(key_heads: int, value_heads: int, spelling: str, budget: float) -> None:
    q = torch.randn(2, 4, LENGTH, 16)
    k, v = (torch.randn(2, heads, LENGTH, 16) for heads in (key_heads, value_heads))

    def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x if x.shape[1] in (1, 4) else x.repeat_interleave(4 // x.shape[1], 1) for x in (k, v))
        if spelling == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        scores = (q @ k.mT / 4).masked_fill(torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1), -torch.inf)
        return scores.softmax(-1) @ v

    options = {"budget": budget, "block_size": 64, "min_length": 1, "inner": "eager"}
    torch._dynamo.reset()
    with torch.no_grad():
        run = torch.compile(grouped, backend="stem", options={**options, "fallback": "error"}, fullgraph=True)
        out, repeated = run(q, k, v), run(q, *(x.repeat_interleave(4 // x.shape[1], 1) for x in (k, v)))
        told = stem_compile.explain(grouped, options)(q, k, v)
    assert [s["decision"] for s in told.to_dict()["sites"]] == ["rewritten"]
    assert_close(out, repeated, CLOSE_SAME)
    if budget == 1.0:
        assert_close(out, grouped(q, k, v), CLOSE_SAME)


def test_heads_that_do_not_divide_are_one_clear_error() -> None:
    q, k, v = (torch.randn(1, heads, 64, 16, device="meta") for heads in (4, 2, 4))
    lists = torch.empty(1, 4, 1, 1, dtype=torch.int32, device="meta"), torch.empty(1, 4, 1, device="meta")
    with pytest.raises(ValueError, match="4 query heads, 2 key heads and 4 value heads"):
        torch.ops.stem.sparse_attention(q, k, v, *lists, [], [], "kv <= q", 1.0, "", "cpu gather")


def padded(q: torch.Tensor, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Attention under a mask of [B, 1, N, N] that comes from outside."""
    return F.scaled_dot_product_attention(q, x, x, attn_mask=keep)


def written_out(q: torch.Tensor, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    scores = (q @ x.mT * 0.3).masked_fill(~keep, -torch.inf)
    return scores.softmax(-1) @ x


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("side", ["left", "right", "middle", "by row"])
@pytest.mark.parametrize("function", [padded, written_out])
def test_what_hidden_keys_hold_moves_no_output(function: Any, side: str, pooling: str) -> None:
    """Padding inside a mask of N x N, which nothing tells from any other given mask."""
    length = 1600
    position = torch.arange(length)
    hidden = {
        "left": position < 100,
        "right": position >= 1390,
        "middle": (position >= 300) & (position < 1100) & (position % 64 < 40),
    }
    keep = torch.ones(length, length, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    if side == "by row":  # half of the early keys, hidden from later rows only
        rows, keys = position >= 640, (position < 600) & (position % 64 < 40)
        keep &= ~(rows[:, None] & keys)
    else:
        keep[1] &= ~hidden[side]
        keep[1] |= torch.eye(length, dtype=torch.bool) & hidden[side]  # rows of the padding see themselves
        rows, keys = ~hidden[side], hidden[side]
    # Queries stay: one of the padding is as visible a row as any, and shares its block's selection.
    q, x = torch.randn(2, 2, length, 16), torch.randn(2, 2, length, 16)
    options = {"budget": 0.3, "block_size": 64, "min_length": 1, "inner": "eager", "pooling": pooling}
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="stem", options={**options, "fallback": "error"}, fullgraph=True)
    with torch.no_grad():
        out = compiled(q, x, keep)
        other = x.clone()
        other[1, :, keys] = 30 * torch.randn(2, int(keys.sum()), 16)
        again = compiled(q, other, keep)
    assert torch.equal(out[0], again[0])
    assert_close(out[1][:, rows], again[1][:, rows], CLOSE_SHORT)
    assert not torch.equal(out[1], function(q, x, keep)[1]), "nothing was left out"


@pytest.mark.parametrize("poison", [float("inf"), float("nan")])
def test_padding_may_hold_anything(poison: float) -> None:
    def masked(x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(x.shape[2])
        keep = (rows <= rows[:, None]) & real[:, None, None]
        scores = (x @ x.mT * 0.3).masked_fill(~keep, -torch.inf)
        return scores.softmax(-1).nan_to_num(0.0) @ x.nan_to_num(0.0, 0.0, 0.0)

    real = torch.ones(2, 640, dtype=torch.bool)
    real[1, :100] = False
    x = torch.randn(2, 2, 640, 16)
    options = {"block_size": 64, "min_length": 1, "inner": "eager", "fallback": "error"}
    torch._dynamo.reset()
    spoilt = x.clone()
    spoilt[1, :, :100] = poison
    with torch.no_grad():
        for budget in (1.0, 0.25):
            compiled = torch.compile(masked, backend="stem", options={**options, "budget": budget}, fullgraph=True)
            out, again = compiled(x, real), compiled(spoilt, real)
            torch.testing.assert_close(again[1, :, 100:], out[1, :, 100:])


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("pad", [100, 600, 611])
def test_padding_that_may_look_everywhere_leaves_its_neighbours_theirs(pad: int, pooling: str) -> None:
    """A mask of N x N whose fully hidden rows were opened, as models do to spare a softmax of nothing."""
    length = 1600
    keep = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    keep = keep & (torch.arange(length) >= pad)
    keep = keep | ~keep.any(-1, keepdim=True)
    q, x = torch.randn(1, 2, length, 16), torch.randn(1, 2, length, 16)
    options = {"budget": 0.25, "block_size": 64, "min_length": 1, "inner": "eager", "pooling": pooling}
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(padded, backend="stem", options={**options, "fallback": "error"})(q, x, keep)
    expected = padded(q, x, keep)
    block = slice(pad, -(-pad // 64) * 64)  # real rows in a block that padding shares
    torch.testing.assert_close(out[:, :, block], expected[:, :, block])
    assert not (out == 0).all(-1).any(), "a row that sees keys computes some"
    assert not torch.equal(out, expected), "nothing was left out"
