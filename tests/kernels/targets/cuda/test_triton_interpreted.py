"""The GPU target in Triton's interpreter: the portable template and the selection kernels against their definitions,
anywhere.

The interpreter multiplies bf16 as integers, so these run in fp16 and fp32; ``test_triton_gpu.py`` has the rest.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from tests.kernels.kernel_cases import (
    ALIBI,
    BIAS,
    CAUSAL,
    CHUNKED,
    DOCUMENT,
    EDGED,
    GIVEN,
    LAST_ROWS,
    LEFT_CHUNKED,
    MASKS,
    PADDED,
    PREFIX,
    SCALAR,
    SCORES,
    SHIFTED,
    SINK,
    SOFTCAP,
    TEMPERATURE,
    TOLERANCE,
    WINDOW,
    Case,
    attention_error,
    selection_gap,
)

pytest.importorskip("triton")
from stem_compile.algebra.symbolic import ROW
from stem_compile.kernels.targets.cuda import attention as kernel
from stem_compile.kernels.targets.cuda import device, selection
from stem_compile.kernels.targets.cuda import target as cuda
from stem_compile.kernels.targets.cuda.configurations import MARKED_ROWS, Config
from stem_compile.kernels.triton.arguments import arguments
from stem_compile.reasons import Reason
from stem_compile.selection import Attention
from stem_compile.selection.oam import oam_scores
from stem_compile.selection.policies import POLICIES
from stem_compile.selection.tpd import tpd_select

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the compiled kernels")


@st.composite
def cases(draw: Any) -> Case:
    mask = draw(st.sampled_from([*MASKS, *EDGED]))
    q_len = draw(st.integers(1, 150))
    extra = 0 if mask in (CAUSAL, WINDOW, DOCUMENT, CHUNKED, LEFT_CHUNKED) else draw(st.integers(0, 100))
    key_heads = draw(st.integers(1, 2))
    return Case(
        q_len=q_len,
        kv_len=q_len + extra,
        batch=draw(st.integers(1, 2)),
        heads=key_heads * draw(st.integers(1, 2)),
        key_heads=key_heads,
        head_dim=draw(st.sampled_from([16, 32, 40])),
        value_dim=draw(st.sampled_from([16, 24])),
        block_q=draw(st.sampled_from([16, 32])),
        block_k=draw(st.sampled_from([16, 32])),
        dtype=draw(st.sampled_from([torch.float32, torch.float16])),
        mask=mask,
        kind=draw(st.sampled_from(SCORES)),
        pad=draw(st.sampled_from(["left", "right", "holes"])),
        layout=draw(st.sampled_from(["bhnd", "bnhd", "sliced"])),
        budget=draw(st.sampled_from([0.2, 0.5, 1.0])),
        pooling=draw(st.sampled_from(["mean", "max"])),
        metric=draw(st.sampled_from(["paper", "released"])),
        stride=draw(st.sampled_from([8, 16])),
        seed=draw(st.integers(0, 99)),
        rise=draw(st.sampled_from([1.0, 100.0])),
        fall=draw(st.sampled_from([1.0, 100.0])),
    )


@given(cases())
@example(Case(300, 300, budget=0.3, block_q=64, block_k=32))
@example(Case(40, 170, 2, mask=PADDED, pad="right", block_q=16, block_k=16, budget=0.3, dtype=torch.float16))
@example(Case(1, 97, mask=LAST_ROWS, block_q=16, block_k=32))
@example(Case(200, 200, block_q=32, block_k=16, fall=100.0, budget=0.3))
@example(Case(200, 200, block_q=32, block_k=16, fall=100.0, budget=1.0, kind=SINK))
@example(Case(300, 300, mask=WINDOW, kind=SOFTCAP + SINK, block_q=32, block_k=16, budget=0.3))
@example(Case(300, 300, mask=CHUNKED, kind=ALIBI, block_q=16, block_k=32, budget=1.0))
@example(Case(150, 150, 2, mask=LEFT_CHUNKED, kind=TEMPERATURE, block_q=32, block_k=32, budget=1.0))
@example(Case(100, 190, 2, mask=SHIFTED, kind=BIAS, block_q=16, block_k=16, dtype=torch.float16, budget=0.3))
@example(Case(100, 100, 2, mask=PREFIX, kind=SINK, block_q=16, block_k=16, dtype=torch.float16, budget=0.3))
def test_attention(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        error = attention_error(case, cuda, "portable", patch)
    assert error < TOLERANCE[case.dtype]


@given(cases())
@example(Case(400, 400, 1, 2, 1, block_q=32, block_k=32, budget=0.3, pooling="max"))
@example(Case(400, 433, 2, 2, 2, 80, 32, 32, 32, mask=PADDED, pad="left", budget=0.3))
@example(Case(500, 700, 1, 2, 1, block_q=64, block_k=32, mask=SCALAR, budget=0.25, pooling="max"))
@example(Case(400, 400, 1, 2, 1, block_q=32, block_k=16, mask=WINDOW, budget=0.1))
@example(Case(500, 500, 1, 2, 1, block_q=16, block_k=32, mask=CHUNKED, budget=0.1, pooling="max"))
@example(Case(400, 400, 2, 2, 1, block_q=16, block_k=16, mask=LEFT_CHUNKED, budget=0.1))
@example(Case(300, 400, 2, 2, 1, block_q=16, block_k=16, mask=GIVEN, budget=0.2))
def test_selection(case: Case) -> None:
    gap, counts = selection_gap(case, cuda)
    assert counts
    assert gap < (1e-4 if case.dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("mask", [GIVEN, DOCUMENT, PREFIX])
@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize(
    ("sizes", "stride", "dtype", "metric"),
    [((32, 16), 8, torch.float32, "released"), ((16, 64), 4, torch.float16, "paper")],
)
def test_scores_where_single_pairs_are_hidden(
    mask: str, pooling: str, sizes: tuple[int, int], stride: int, dtype: torch.dtype, metric: str
) -> None:
    case = Case(170, 170, 2, 2, 1, 24, 16, *sizes, dtype, mask, budget=0.2, pooling=pooling, stride=stride)
    gap, counts = selection_gap(replace(case, metric=metric), cuda)
    assert counts
    assert gap < (1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_what_is_hidden_is_not_read(pooling: str) -> None:
    """Keys that a given mask hides from every query, whatever they hold."""
    case = Case(170, 170, 1, 2, 1, 16, 16, 16, 16, mask=GIVEN, budget=0.2, pooling=pooling, stride=8)
    attention = case.attention()
    attention.tensors[0][..., 20:75] = False
    lists = attention.selection(*cuda.select(attention, "select")).dense(attention.candidates)
    for poison in (1e30, float("inf"), float("nan")):
        spoilt = replace(attention, k=attention.k.clone(), v=attention.v.clone())
        spoilt.k[:, :, 20:75], spoilt.v[:, :, 20:75] = poison, poison
        assert torch.equal(lists, spoilt.selection(*cuda.select(spoilt, "select")).dense(attention.candidates))


@pytest.mark.parametrize("mask", [CAUSAL, WINDOW])
@pytest.mark.parametrize("loud", [0, 3])
def test_equal_scores_go_to_the_earlier_blocks(loud: int, mask: str) -> None:
    """Keys that say nothing, of which ``loud`` blocks have larger values."""
    case = Case(400, 400, 1, 2, 1, 16, 16, 16, 16, budget=0.3, mask=mask)
    attention = case.attention(scale=0.25)
    attention.k.zero_()
    attention.v.fill_(1.0)[:, :, 64 : 64 + 16 * loud] = 9.0
    indices, counts = cuda.select(attention, "select")
    expected = tpd_select(oam_scores(attention), attention.spec, attention.reach)
    listed = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
    assert torch.equal(counts, expected.counts)
    assert torch.equal(indices[listed], expected.indices[..., : indices.shape[-1]][listed])


def test_scores_in_row_chunks_are_the_same(monkeypatch: Any) -> None:
    attention = Case(700, 700, 1, 2, 1, 16, 16, 16, 16, budget=0.3).attention(scale=0.25)
    whole = cuda.select(attention, "select")
    monkeypatch.setattr(selection, "SCORE_BYTES", 1)
    monkeypatch.setattr(selection, "CHUNK_UNIT", 16)
    parts = cuda.select(attention, "select")
    listed = torch.arange(whole[0].shape[-1]) < whole[1].unsqueeze(-1)
    assert torch.equal(whole[1], parts[1])
    assert torch.equal(whole[0][listed], parts[0][listed])


@pytest.mark.parametrize("block_k", [32, 64, 128])
@pytest.mark.parametrize(
    ("block_q", "mask", "kind"), [(64, CAUSAL, ""), (128, CAUSAL, SINK), (128, PADDED, SOFTCAP), (128, WINDOW, "")]
)
def test_marked_rows_are_computed_again_and_no_others(block_q: int, block_k: int, mask: str, kind: str) -> None:
    case = Case(450, 450, 2, 2, 1, 16, 32, block_q, block_k, mask=mask, kind=kind)
    attention = case.attention(scale=0.25)
    lists = case.random_selection(attention)
    q, k, v = attention.q, attention.k, attention.v
    parts = block_q // MARKED_ROWS
    marks = (torch.rand(2, 2, lists.counts.shape[2], parts) < 0.4).int()
    marks[-1, -1, -1, -1] = 1  # beyond the last query where only 2 rows are left
    scale = 0.25 * (1.0 if kind == SOFTCAP else kernel.LOG2E)
    extra = arguments(attention.tensors, attention.scalars, mask, case.score)
    runtime = (2, 2, 450, 450, lists.indices.shape[-1], scale, *extra)
    fill = float("nan")
    out, lse = torch.full_like(q[..., :1], fill).repeat(1, 1, 1, 32), torch.full(q.shape[:3], fill)
    spec = kernel.attention_spec("portable", attention)
    launch = kernel.Launch(spec, q, k, v, out, lse, lists.indices, lists.counts, runtime)
    tiles = kernel.Tiles(launch, Config(min(64, block_k), 2, 4, MARKED_ROWS), bulk=False)
    kernel.attend_marked(marks, spec, tiles)
    expected_lse = torch.empty_like(lse)
    expected = cuda.attend(attention, lists, "portable", lse=expected_lse)
    again = marks.bool().flatten(2).repeat_interleave(MARKED_ROWS, -1)[..., :450]
    assert out[~again].isnan().all()
    assert lse[~again].isnan().all()
    torch.testing.assert_close(out[again], expected[again])
    torch.testing.assert_close(lse[again], expected_lse[again])


def test_what_the_templates_do_not_cover_is_refused() -> None:
    x = torch.empty(1, 2, 256, 64)
    assert cuda.supports(Attention(x, x, x, CAUSAL, score_text=" ; sink T0(h)")) is None
    assert cuda.supports(Attention(x, x, x, CAUSAL, score_text=" ; sink T0(h, q)")) is Reason.DEVICE
    assert cuda.supports(Attention(x, x, x, CAUSAL).to(torch.float64)) is Reason.DTYPE
    assert cuda.supports(Attention(x[..., :8], x[..., :8], x, CAUSAL)) is Reason.HEAD_DIM


def test_what_cannot_be_printed_fails_when_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, 2, 256, 64)
    policy = SimpleNamespace(
        SCORED=True,
        ANY_ORDER=False,
        budget=lambda spec: sympy.sign(ROW) + 1,
        width=lambda spec, key_blocks: key_blocks,
        min_length=lambda spec: 0,
    )
    with POLICIES.register("toy", policy), pytest.raises(TypeError, match="sign"):
        cuda.kernels(Attention(x, x, x, CAUSAL, spec_text="policy=toy"))


def test_the_kernel_that_is_named_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "capability", lambda _: (9, 0))
    x = torch.empty(1, 2, 256, 64, dtype=torch.bfloat16)
    wide = torch.empty(1, 2, 256, 65, dtype=torch.bfloat16)
    for k, template in (
        (x, "hopper"),
        (x.transpose(1, 2).contiguous().transpose(1, 2), "hopper"),
        (x.mT.contiguous().mT, "hopper"),  # copied, since its rows are not consecutive
        (wide[..., :64], "portable"),
        (wide.flatten()[1 : 1 + x.numel()].view(x.shape), "portable"),
        (x[:, :1].expand(1, 2, 256, 64), "portable"),
    ):
        assert cuda.kernels(Attention(x, k, x, CAUSAL)).attend.startswith(template), (k.stride(), k.storage_offset())


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale: float) -> None:
    case = Case(50, 50, block_q=16, block_k=16)
    attention = case.attention(scale=scale)
    lists = case.random_selection(attention)
    out = cuda.attend(attention, lists, "portable")
    flipped = cuda.attend(replace(attention, q=attention.q * scale, scale=1.0), lists, "portable")
    torch.testing.assert_close(out, flipped)
