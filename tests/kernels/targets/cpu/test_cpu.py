"""The CPU target against the reference and the definitions: any shape, any selection, poisoned memory, several
threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from stem_compile import ops
from stem_compile.algebra.blocks import cdiv
from stem_compile.algebra.masks import environment
from stem_compile.algebra.scores import Score
from stem_compile.algebra.symbolic import KV, SCORE, B, H, Q
from stem_compile.kernels import reference
from stem_compile.kernels.targets.cpu import gather, pooling, rowwise, workers
from stem_compile.kernels.targets.cpu import target as cpu
from stem_compile.reasons import Reason
from stem_compile.selection import FULL, Attention, BlockSelection, SelectionSpec
from stem_compile.testing.tolerances import CPU_KERNEL, CPU_KERNEL_FP64, LARGE_SCORES
from tests.kernels.kernel_cases import (
    ALIBI,
    BIAS,
    CAUSAL,
    CHUNKED,
    DOCUMENT,
    LAST_ROWS,
    MASKS,
    PADDED,
    SCALAR,
    SCORES,
    WINDOW,
    Case,
    selection_gap,
)
from tests.numerics import assert_close

quick = settings(derandomize=True, max_examples=60)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote is NaN. One thread but where threads are the point: many small calls crawl when other
    programs want the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@st.composite
def cases(draw: Any) -> Case:
    mask = draw(st.sampled_from(MASKS))
    q_len = draw(st.integers(1, 500))
    extra = 0 if mask in (CAUSAL, WINDOW, DOCUMENT, CHUNKED) else draw(st.integers(0, 200))
    key_heads = draw(st.integers(1, 2))
    return Case(
        q_len=q_len,
        kv_len=q_len + extra,
        batch=draw(st.integers(1, 2)),
        heads=key_heads * draw(st.integers(1, 3)),
        key_heads=key_heads,
        head_dim=draw(st.sampled_from([16, 40])),
        value_dim=draw(st.sampled_from([16, 24, 64])),
        block_q=draw(st.sampled_from([32, 64])),
        block_k=draw(st.sampled_from([16, 32, 64])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])),
        mask=mask,
        kind=draw(st.one_of(st.just(""), st.sampled_from(SCORES))),
        pad=draw(st.sampled_from(["left", "right", "holes"])),
        layout=draw(st.sampled_from(["bhnd", "bnhd", "sliced"])),
        budget=draw(st.sampled_from([0.2, 0.5, 1.0])),
        pooling=draw(st.sampled_from(["mean", "max"])),
        metric=draw(st.sampled_from(["paper", "released"])),
        stride=draw(st.sampled_from([8, 16])),
        seed=draw(st.integers(0, 99)),
    )


def any_lists(case: Case, lists: BlockSelection, candidates: torch.Tensor) -> BlockSelection:
    """Another selection from the same candidates: every row and head has its own length, forced blocks or not."""
    generator = torch.Generator().manual_seed(case.seed)
    keep = (torch.rand(*lists.counts.shape, lists.key_blocks, generator=generator) < 0.4) & candidates
    counts = keep.sum(-1)
    indices = (
        torch.where(keep, torch.arange(lists.key_blocks), lists.key_blocks)
        .sort(-1)
        .values.clamp(max=lists.key_blocks - 1)
    )
    counts = torch.where(torch.rand(counts.shape, generator=generator) < 0.2, FULL, counts)
    return replace(lists, indices=indices.int(), counts=counts.int())


def sdpa_error(case: Case, attention: Attention, lists: BlockSelection, golden: torch.Tensor) -> float:
    """SDPA's own error in the case's dtype, given the whole mask as a tensor."""
    q, k, v = attention.q, attention.k, attention.v
    dense = lists.dense(attention.candidates)
    visible = attention.mask.dense().expand(case.shape)
    computed = dense.repeat_interleave(case.block_q, 2)[:, :, : case.q_len].repeat_interleave(case.block_k, 3)[
        ..., : case.kv_len
    ]
    if not case.score:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible & computed, scale=case.head_dim**-0.5, enable_gqa=True
        )
    else:
        # Written out as models do: products in the case's dtype, the rest in fp32.
        keys, values = (x.repeat_interleave(case.heads // case.key_heads, 1) for x in (k, v))
        score, extra = attention.score, (attention.tensors, attention.scalars)
        axes = [torch.arange(n).view([-1 if i == j else 1 for j in range(4)]) for i, n in enumerate(case.shape)]
        scores = score.apply(
            (q @ keys.mT * case.head_dim**-0.5).to(torch.promote_types(q.dtype, torch.float32)),
            environment(case.shape, *extra) | dict(zip((B, H, Q, KV), axes)),
        )
        scores = scores.masked_fill(~(visible & computed), -torch.inf)
        sink = score.sink_logits(case.shape, *extra, scores)
        scores = scores if sink is None else torch.cat([scores, sink.expand(case.batch, case.heads, case.q_len, 1)], -1)
        out = scores.softmax(-1)[..., : case.kv_len].nan_to_num(0.0).to(q.dtype) @ values
    return float((out.double() - golden).abs().max())


def attend(attention: Attention, lists: BlockSelection, **rest: Any) -> torch.Tensor:
    return cpu.attend(attention, lists, cpu.kernels(attention).attend, **rest)


def select(attention: Attention) -> BlockSelection:
    return attention.selection(*cpu.select(attention, cpu.kernels(attention).select))


def check_attention(case: Case, every_list: bool) -> None:
    attention = case.attention()
    q = attention.q
    lists = case.random_selection(attention)
    if every_list:
        lists = any_lists(case, lists, attention.candidates)
    lse = torch.full(q.shape[:3], torch.nan, dtype=torch.float64)
    out = attend(attention, lists, lse=lse)
    golden = reference.sparse_attention(attention.to(torch.float64), lists)
    like = ops.attention_output(q, attention.v)
    assert (out.shape, out.stride(), out.dtype) == (like.shape, like.stride(), q.dtype)
    tolerance = CPU_KERNEL_FP64 if q.dtype == torch.float64 else CPU_KERNEL
    allowed = tolerance.allowed(sdpa_error(case, attention, lists, golden), float(golden.abs().max()), q.dtype)
    assert float((out.double() - golden).abs().max()) <= allowed
    # exp(lse) is what the weights sum to: an attention over values of one must come back as one.
    empty = golden.abs().sum(-1) == 0
    blind = (lse == -torch.inf) | (attention.score.sink is not None)
    assert (out[empty] == 0).all() and blind[empty].all() and lse[~empty].isfinite().all()


@quick
@given(cases(), st.booleans())
@example(Case(640, 640, 1, 6, 2, block_q=64, block_k=32, budget=0.5), False)
@example(Case(640, 901, 2, 6, 2, block_q=64, block_k=64, budget=0.5, mask=PADDED, pad="left"), False)
@example(Case(640, 640, 1, 2, 1, block_q=32, block_k=64, budget=0.3, dtype=torch.bfloat16), False)
@example(Case(500, 500, 2, 2, 1, mask=WINDOW, block_q=64, block_k=32), True)
@example(Case(300, 333, mask="True", block_q=64, block_k=32), True)
@example(Case(150, 260, mask=SCALAR, block_q=64, block_k=32), True)
@example(Case(1, 97, mask=LAST_ROWS, block_q=16, block_k=32), False)
def test_attention_is_the_references(case: Case, every_list: bool) -> None:
    check_attention(case, every_list)


@pytest.mark.parametrize("blocks", [(128, 128), (128, 64), (128, 32), (64, 64), (64, 32), (64, 128)])
@pytest.mark.parametrize("mask", [CAUSAL, PADDED])
def test_real_block_sizes(blocks: tuple[int, int], mask: str) -> None:
    torch.set_num_threads(2)
    check_attention(Case(1100, 1100, 1, 3, 1, 32, 32, *blocks, budget=0.4, mask=mask), every_list=False)


def test_bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "NATIVE_BF16", True)
    for mask in (CAUSAL, PADDED, WINDOW):
        check_attention(Case(900, 900, 1, 3, 1, 32, 24, 64, 32, torch.bfloat16, mask, budget=0.4), every_list=False)


@pytest.mark.parametrize("kind", [ALIBI, BIAS])
def test_a_bias_is_not_rounded_to_the_dtype_of_the_products(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "NATIVE_BF16", True)
    case = Case(700, 700, 1, 2, 1, 32, 32, 64, 64, torch.bfloat16, kind=kind, budget=1.0)
    attention = case.attention()
    bias = torch.tensor([3.7, 0.9]) if kind == ALIBI else 300 * torch.rand(1, 2, 700, 700)
    attention = replace(attention, tensors=[bias])
    lists = case.random_selection(attention)
    golden = reference.sparse_attention(attention.to(torch.float64), lists)
    out = attend(attention, lists)
    # Two roundings to bf16 of values that are at most a few.
    assert float((out.double() - golden).abs().max()) <= 2 * 2.0**-8 * float(golden.abs().max())


@pytest.mark.parametrize("scale", [-0.4, 0.0, 3.0])
def test_any_scale(scale: float) -> None:
    case = Case(300, 300, block_q=64, block_k=32, budget=0.3, dtype=torch.float64)
    attention = case.attention(scale=scale)
    lists = case.random_selection(attention)
    torch.testing.assert_close(attend(attention, lists), reference.sparse_attention(attention, lists))


def test_log_sum_exp() -> None:
    case = Case(400, 460, 2, 4, 2, block_q=64, block_k=32, budget=0.4, dtype=torch.float64, mask=PADDED)
    attention = case.attention(scale=0.2)
    lists = case.random_selection(attention)
    lse = torch.full(attention.q.shape[:3], torch.nan, dtype=torch.float64)
    attend(attention, lists, lse=lse)
    computed = lists.dense(attention.candidates)
    computed = computed.repeat_interleave(64, 2)[:, :, :400].repeat_interleave(32, 3)[..., :460]
    scores = attention.q @ attention.k.repeat_interleave(2, 1).transpose(-1, -2) * 0.2
    want = scores.masked_fill(~(computed & attention.mask.dense()), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse, want)


def test_large_scores_do_not_overflow() -> None:
    case = Case(400, 400, 1, 2, 1, block_q=64, block_k=32, budget=0.4)
    plain = case.attention(scale=1.0)
    attention = replace(plain, q=plain.q * 40, k=plain.k * 40)
    lists = case.random_selection(attention)
    golden = reference.sparse_attention(attention.to(torch.float64), lists)
    assert_close(attend(attention, lists).double(), golden, LARGE_SCORES, torch.float32)


def test_weights_add_up_to_one_where_scores_lose_their_sum() -> None:
    """log(70) is lost in -1e38, so weights are divided by their sum."""
    q, key, value = (torch.randn(*shape) for shape in ((1, 5, 8), (70, 8), (70, 8)))
    out, lse = rowwise._open(q, key, value, 1.0, Score(SCORE * 0 - 1e38), {}, torch.zeros(1, 5, 70))
    torch.testing.assert_close(out, value.mean(0).expand(1, 5, 8))
    assert bool(lse.isfinite().all())


@quick
@given(cases())
def test_runs_cover_every_row_once(case: Case) -> None:
    if case.mask in (WINDOW, DOCUMENT):
        return
    attention = case.attention(scale=1.0)
    lists = case.random_selection(attention)
    problem = cpu._problem(attention, lists, ops.attention_output(attention.q, attention.v), None)
    times = torch.zeros(lists.counts.shape, dtype=torch.int)
    for run in cpu._spans(problem, lists.counts, case.spec):
        times[run.batch, run.heads.start : run.heads.stop, run.rows.start : run.rows.stop] += 1
    assert (times == 1).all()


def test_forced_blocks_are_not_gathered() -> None:
    """What makes it fast: sinks and local blocks are views, heads of a group and neighbouring rows run together."""
    spec = SelectionSpec(budget=0.3)
    q, k, v = torch.randn(1, 3, 4096, 16), torch.randn(1, 1, 4096, 16), torch.randn(1, 1, 4096, 16)
    attention = Attention(q, k, v, CAUSAL, 0.25, spec.text())
    lists = select(attention)
    problem = cpu._problem(attention, lists, ops.attention_output(q, v), None)
    runs = list(cpu._spans(problem, lists.counts, spec))
    listed = [run for run in runs if run.count is not None]
    assert {(run.prefix, run.window, len(run.heads)) for run in listed} == {(spec.sinks, spec.locals, 3)}
    assert len(runs) < 0.7 * lists.counts.shape[2]


@quick
@given(cases())
@example(Case(400, 433, 2, 2, 2, 80, 32, 32, 32, mask=PADDED, pad="left", budget=0.3))
@example(Case(700, 700, 2, 6, 2, block_q=64, block_k=32, budget=0.3, pooling="max"))
@example(Case(700, 990, 2, 6, 2, block_q=64, block_k=32, budget=0.3, pooling="max", mask=PADDED, pad="holes"))
@example(Case(5000, 5000, 1, 2, 1, 16, 16, budget=0.25))
@example(Case(5000, 5000, 1, 2, 1, 16, 16, budget=0.25, pooling="max"))
def test_selection_is_the_definitions(case: Case) -> None:
    gap, counts = selection_gap(case, cpu)
    assert counts
    # Scores are fp32 whatever the inputs: only the order of sums differs.
    assert gap < 1e-4


def test_selection_under_a_mask_that_differs_by_head() -> None:
    case = Case(600, 600, 1, 4, 2, block_q=32, block_k=32, budget=0.4, mask="(kv <= q) & (kv > q - 64 - 150*h)")
    gap, counts = selection_gap(case, cpu)
    assert counts and gap < 1e-4
    check_attention(case, every_list=False)


@pytest.mark.parametrize("spec", [SelectionSpec(budget=1.0), SelectionSpec(policy="dense"), SelectionSpec()])
def test_nothing_is_scored_where_every_row_is_full(spec: SelectionSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "ranked", None)
    case = Case(1000, 1100, 2, 4, 2, mask=PADDED)
    attention = case.attention(scale=1.0, spec_text=spec.text())
    lists = select(attention)
    assert tuple(lists.indices.shape) == ops.selection_shape(attention.q, attention.k, spec)
    assert lists.indices.dtype == lists.counts.dtype == torch.int32
    assert lists.key_blocks == cdiv(1100, 128)
    assert torch.equal(lists.dense(attention.candidates), attention.candidates.expand(2, 4, -1, -1))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("mask", [CAUSAL, PADDED, WINDOW])
@pytest.mark.parametrize("pool", ["mean", "max"])
def test_memory_grows_linearly(mask: str, pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Modes are thread-local: run the pieces here.
    monkeypatch.setattr(workers, "run", lambda work, pieces: [work(piece) for piece in pieces])
    for module, name, small in (
        (pooling, "PIECE", {"mean": 128, "max": 128}),
        (gather, "GATHERED", 1),
        (cpu, "TALL", 1),
    ):
        monkeypatch.setattr(module, name, small)
    largest = []
    for length in (2048, 4096):
        case = Case(length, length, 1, 2, 1, 16, 16, 32, 32, mask=mask, budget=0.25, pooling=pool)
        attention = case.attention(scale=0.2)
        with Largest() as watch:
            attend(attention, select(attention))
        largest.append(watch.elements)
    assert largest[1] <= 2.1 * largest[0]


def test_threads_share_the_work_and_leave_no_trace() -> None:
    torch.set_num_threads(3)
    calls, lock, meet = [], threading.Lock(), threading.Barrier(3, timeout=30)

    def work(piece: int) -> None:
        if piece < 3:
            meet.wait()
        with lock:
            calls.append((piece, threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()))

    workers.run(work, range(50))
    assert sorted(piece for piece, *_ in calls) == list(range(50))
    assert len({thread for _, thread, *_ in calls}) == 3
    assert {tuple(rest) for _, _, *rest in calls} == {(1, False)}
    assert torch.get_num_threads() == 3
    threads = []
    thread = threading.Thread(target=lambda: threads.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert threads == [3]


def test_errors_reach_the_caller() -> None:
    def work(piece: int) -> None:
        raise ZeroDivisionError(piece)

    with pytest.raises(ZeroDivisionError):
        workers.run(work, range(5))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("threads", [1, 2])
def test_under_any_gradient_mode(mode: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    with mode():
        case = Case(300, 300, block_q=64, block_k=32, budget=0.3)
        attention = case.attention(scale=0.2)
        out = attend(attention, select(attention))
        assert out.isfinite().all() and not out.requires_grad
        assert out.is_inference() == torch.is_inference_mode_enabled()


def test_names_need_no_data() -> None:
    x = torch.empty(1, 2, 256, 64, dtype=torch.bfloat16, device="meta")
    plain = Attention(x, x, x, CAUSAL, spec_text=SelectionSpec(block_k=64, pooling="max", budget=0.5).text())
    assert cpu.kernels(plain) == ("cpu max 128x64", "cpu gather bf16 128x64")
    assert cpu.kernels(replace(plain, mask_text=WINDOW)).attend == "cpu rowwise bf16 128x64"
    assert cpu.kernels(replace(plain, spec_text="budget=1.0")).select == "cpu unscored 128x128"
    assert cpu.supports(plain) is None
    assert cpu.supports(plain.to(torch.int8)) is Reason.DTYPE
    wide = torch.empty(1, 2, 256, 1025, device="meta")
    assert cpu.supports(Attention(wide, wide, wide)) is Reason.HEAD_DIM


def _soft(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.tanh(q @ k.transpose(-1, -2) / 20) * 5
    return torch.softmax(scores.masked_fill(~torch.ones(scores.shape[-2:]).tril().bool(), -torch.inf), -1) @ v


def _plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("model", [_soft, _plain])
@pytest.mark.parametrize("place", ["key", "value"])
def test_nan_that_a_row_sees_is_not_hidden(model: Callable[..., torch.Tensor], place: str) -> None:
    q, k, v = (torch.randn(1, 2, 300, 16, generator=torch.Generator().manual_seed(s)) for s in range(3))
    (k if place == "key" else v)[:, :, 170, 3] = torch.nan
    options = {"budget": 1.0, "min_length": 1, "inner": "eager"}
    out = torch.compile(model, backend="stem", options=options)(q, k, v)
    # Rows before it are eager's affair: there 0 * NaN is NaN too.
    assert torch.equal(out[:, :, 170:].isnan(), model(q, k, v)[:, :, 170:].isnan())
    assert out[:, :, 170:].isnan().any()
