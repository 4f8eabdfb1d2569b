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
from stem_compile.testing.tolerances import CLOSE_SAME
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
