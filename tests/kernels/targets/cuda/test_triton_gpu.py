"""The GPU target on a GPU: every template against the fp64 reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from stem_compile.kernels import launch
from stem_compile.kernels.targets.cuda import device
from stem_compile.selection import Attention
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

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
TEMPLATES = ("portable", "hopper")
HALF = (torch.bfloat16, torch.float16)
SQUARE = (CAUSAL, WINDOW, DOCUMENT, CHUNKED, LEFT_CHUNKED)
"""Masks that count queries and keys alike."""


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: Any) -> None:
    """Persistent kernels take several rows each, as they do at real sizes."""
    monkeypatch.setattr(device, "multiprocessors", lambda _: 5)


def check(case: Case, template: str, monkeypatch: Any) -> None:
    target = launch.target("cuda")
    assert target is not None
    q, k, v = (
        torch.empty(1, 1, 1, d, dtype=case.dtype, device="cuda") for d in (case.head_dim, case.head_dim, case.value_dim)
    )
    asked = Attention(q, k, v, case.mask, spec_text=case.spec.text(), score_text=case.score)
    assert target.supports(asked) is None
    name = target.kernels(asked).attend
    if template == "hopper" and not name.startswith("hopper"):
        pytest.skip(f"no Hopper kernel: {name}")
    error = attention_error(case, target, name.replace("hopper", template).replace("portable", template), monkeypatch)
    assert error < TOLERANCE[case.dtype], case


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("dims", [(32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_head_dims(template: str, dtype: torch.dtype, dims: tuple[int, int], monkeypatch: Any) -> None:
    check(Case(1000, 1000, 2, 4, 2, *dims, dtype=dtype, device="cuda"), template, monkeypatch)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [(1024, 1024), (700, 1333), (1, 513), (129, 1500)])
def test_masks_and_lengths(template: str, mask: str, lengths: tuple[int, int], monkeypatch: Any) -> None:
    if mask in SQUARE and lengths[0] != lengths[1]:
        mask = LAST_ROWS
    for pad in ("left", "right", "holes") if mask == PADDED else ("left",):
        check(
            Case(*lengths, 2, 4, 2, 128, 128, dtype=torch.bfloat16, mask=mask, pad=pad, device="cuda"),
            template,
            monkeypatch,
        )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("mask", MASKS)
def test_scores_under_masks(template: str, mask: str, monkeypatch: Any) -> None:
    lengths = (900, 900) if mask in SQUARE else (900, 1100)
    for kind in SCORES[1:]:
        check(
            Case(*lengths, 2, 4, 2, 64, 64, dtype=torch.bfloat16, mask=mask, kind=kind, device="cuda"),
            template,
            monkeypatch,
        )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("kind", [SOFTCAP + SINK, BIAS, ALIBI, TEMPERATURE])
def test_scores_of_head_dims(template: str, dims: tuple[int, int], kind: str, monkeypatch: Any) -> None:
    for dtype, mask in (
        (torch.float16, CAUSAL),
        (torch.bfloat16, WINDOW),
        *([(torch.float32, CHUNKED)] if template == "portable" else []),
    ):
        check(Case(700, 700, 1, 4, 2, *dims, dtype=dtype, mask=mask, kind=kind, device="cuda"), template, monkeypatch)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("blocks", [(128, 64), (64, 64), (64, 128), (64, 32)])
def test_edges_cut_blocks_of_every_size(template: str, blocks: tuple[int, int], monkeypatch: Any) -> None:
    for mask in (WINDOW, CHUNKED, LEFT_CHUNKED, *EDGED):
        for budget, lengths in ((0.3, (1000, 1000)), (1.0, (1000, 1000)), (0.3, (500, 1100))):
            if mask in SQUARE and lengths[0] != lengths[1]:
                continue
            check(
                Case(*lengths, 2, 4, 2, 64, 64, *blocks, dtype=torch.bfloat16, mask=mask, budget=budget, device="cuda"),
                template,
                monkeypatch,
            )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("blocks", [(128, 128), (128, 64), (128, 32), (64, 64), (64, 128), (64, 32)])
@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "sliced"])
def test_blocks_and_layouts(template: str, blocks: tuple[int, int], layout: str, monkeypatch: Any) -> None:
    check(
        Case(900, 1100, 1, 8, 2, 64, 64, *blocks, dtype=torch.float16, mask=SCALAR, layout=layout, device="cuda"),
        template,
        monkeypatch,
    )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("dtype", HALF)
def test_peaks_that_rise(template: str, dims: tuple[int, int], dtype: torch.dtype, monkeypatch: Any) -> None:
    """Lists are walked from their ends: scores that grow towards the first keys raise each row's peak again and
    again."""
    for rise, block_k in ((4.0, 128), (40.0, 128), (40.0, 64)):
        check(
            Case(1500, 1500, 1, 4, 2, *dims, block_k=block_k, dtype=dtype, rise=rise, budget=0.6, device="cuda"),
            template,
            monkeypatch,
        )


@pytest.mark.parametrize("garbage", [1.0, 1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("block_k", [128, 64])
def test_hidden_keys_say_nothing_about_a_rows_peak(garbage: float, block_k: int, monkeypatch: Any) -> None:
    """The first tile that a row meets may be hidden from it, whatever its keys hold."""

    class Garbage(Case):
        def inputs(self) -> dict[str, Any]:
            data = super().inputs()
            data["k"][~data["tensors"][0][:, None, :, None].expand_as(data["k"])] = garbage
            return data

    for pad in ("left", "right", "holes"):
        case = Garbage(
            1100, 1100, 2, 4, 2, 128, 128, 128, block_k, dtype=torch.bfloat16, mask=PADDED, pad=pad, device="cuda"
        )
        for template in TEMPLATES:
            check(case, template, monkeypatch)


@pytest.mark.parametrize("template", TEMPLATES)
def test_same_inputs_same_bits(template: str) -> None:
    case = Case(4000, 4000, 1, 4, 2, 128, 128, dtype=torch.bfloat16, device="cuda")
    attention, target = case.attention(scale=0.1), launch.target("cuda")
    assert target is not None
    lists = case.random_selection(attention)
    runs = [target.attend(attention, lists, template) for _ in range(5)]
    assert all(torch.equal(runs[0], r) for r in runs)


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize(
    ("dtype", "mask"),
    [(dtype, mask) for dtype in (*HALF, torch.float32) for mask in (CAUSAL, SCALAR, PADDED, "True", DOCUMENT)]
    + [(torch.bfloat16, mask) for mask in (WINDOW, CHUNKED, LEFT_CHUNKED, SHIFTED, PREFIX, GIVEN, *EDGED)],
)
def test_selection(pooling: str, dtype: torch.dtype, mask: str) -> None:
    target = launch.target("cuda")
    for pad, blocks, dims in (("left", (128, 128), 128), ("right", (128, 64), 64), ("holes", (64, 64), 80)):
        lengths = (3000, 3000) if mask in SQUARE else (2500, 3333)
        case = Case(
            *lengths,
            2,
            4,
            2,
            dims,
            dims,
            *blocks,
            dtype=dtype,
            mask=mask,
            pad=pad,
            pooling=pooling,
            metric="released" if pad == "right" else "paper",
            device="cuda",
        )
        gap, counts = selection_gap(case, target)
        assert counts, case
        # Summaries are rounded to 11 bits for 16-bit inputs; float32 stays float32.
        assert gap < (1e-3 if dtype == torch.float32 else 2e-2), case


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("mask", MASKS)
def test_nothing_waits_for_the_device(pooling: str, mask: str) -> None:
    case = Case(2000, 2000, 2, 4, 2, 64, 64, dtype=torch.bfloat16, mask=mask, kind=SINK, pooling=pooling, device="cuda")
    attention, target = case.attention(scale=0.1), launch.target("cuda")
    assert target is not None
    names = target.kernels(attention)
    for mode in ("default", "error"):  # once to compile
        fresh = replace(attention)
        torch.cuda.set_sync_debug_mode(mode)
        try:
            lists = fresh.selection(*target.select(fresh, names.select))
            target.attend(replace(attention), lists, names.attend)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("lengths", [(8192, 8192), (2048, 6144)])
def test_selection_of_whole_groups(pooling: str, dtype: torch.dtype, lengths: tuple[int, int]) -> None:
    """Lengths that are multiples of the stride and no padding: tiles come by TMA where the device has it."""
    target = launch.target("cuda")
    for blocks, dims in (((128, 128), 128), ((128, 64), 64), ((64, 64), 96)):
        case = Case(
            *lengths,
            1,
            4,
            2,
            dims,
            dims,
            *blocks,
            dtype=dtype,
            mask=CAUSAL if lengths[0] == lengths[1] else SCALAR,
            pooling=pooling,
            device="cuda",
        )
        gap, counts = selection_gap(case, target)
        assert counts, case
        assert gap < 2e-2, case


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("mask", [EDGED[0], EDGED[1], EDGED[5]])
def test_selection_leaves_out_what_lies_beyond_the_far_edge(pooling: str, mask: str) -> None:
    """Long enough that whole tiles of scores are never written."""
    case = Case(
        20_000,
        20_000,
        1,
        2,
        1,
        64,
        64,
        64,
        64,
        dtype=torch.bfloat16,
        mask=mask,
        pooling=pooling,
        budget=0.02,
        device="cuda",
    )
    gap, counts = selection_gap(case, launch.target("cuda"))
    assert counts, case
    assert gap < 2e-2, case


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("lengths", [(5000, 5000), (4099, 6001), (1, 3000), (777, 4000)])
@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "sliced"])
def test_max_pooling_of_ragged_lengths(dtype: torch.dtype, lengths: tuple[int, int], layout: str) -> None:
    """Groups that the end cuts; as chunks of a longer prompt, where the last row of blocks is a list like others."""
    target = launch.target("cuda")
    for blocks, dims, stride in (((128, 128), 128, 16), ((64, 32), 96, 8)):
        for prompt_length in (0, 20000):
            case = Case(
                *lengths,
                1,
                4,
                2,
                dims,
                dims,
                *blocks,
                dtype=dtype,
                mask=LAST_ROWS,
                pooling="max",
                layout=layout,
                stride=stride,
                prompt_length=prompt_length,
                budget=0.2,
                device="cuda",
            )
            gap, counts = selection_gap(case, target)
            assert counts, case
            assert gap < 2e-2, case


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="block scores in fp8 are Hopper's",
)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("lengths", [(8192, 8192), (2048, 6144), (4099, 6001), (1, 3000)])
@pytest.mark.parametrize("layout", ["bhnd", "sliced"])
def test_block_scores_in_fp8(dtype: torch.dtype, lengths: tuple[int, int], layout: str) -> None:
    """Against fp64 scores of operands rounded the same way."""
    for blocks, dims, stride in (((128, 128), 128, 16), ((128, 64), 80, 16), ((64, 32), 96, 8), ((64, 64), 256, 16)):
        case = Case(
            *lengths,
            1,
            4,
            2,
            dims,
            dims,
            *blocks,
            dtype=dtype,
            mask=LAST_ROWS,
            pooling="max",
            layout=layout,
            stride=stride,
            score_dtype="fp8",
            budget=0.2,
            device="cuda",
        )
        gap, counts = selection_gap(case, launch.target("cuda"))
        assert counts, case
        assert gap < 2e-2, case


def test_beyond_two_to_the_31_elements(monkeypatch: Any) -> None:
    """Token strides of a fused projection: element offsets pass 2^31 within one head."""
    n, width = 140_000, 20_000
    store = torch.empty(n * width, dtype=torch.bfloat16, device="cuda")
    parts = [store.as_strided((1, 1, n, 64), (n * width, 64, width, 1), 64 * i) for i in range(3)]
    for p in parts:
        p.normal_()
    target = launch.target("cuda")
    assert target is not None
    attention = Attention(*parts, CAUSAL, 0.125, Case(n, n, budget=0.05).spec.text())
    copies = replace(attention, **{name: p.contiguous() for name, p in zip("qkv", parts)})
    lists, plain = (a.selection(*target.select(a, "select")) for a in (attention, copies))
    assert torch.equal(lists.counts, plain.counts)
    expected = target.attend(copies, lists, "portable")
    for template in TEMPLATES:
        if template == "hopper" and torch.cuda.get_device_capability()[0] != 9:
            continue
        out = target.attend(attention, lists, template)
        assert (out - expected).norm() < 5e-3 * expected.norm()
