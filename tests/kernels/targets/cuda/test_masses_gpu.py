"""Selection by pooled mass on a GPU: scores against the definition in fp64, lists as the scores say."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from stem_compile.selection import FULL, Attention, SelectionSpec, tpd
from stem_compile.selection.mass import log_masses
from tests.kernels.kernel_cases import (
    ALIBI,
    CAUSAL,
    LAST_ROWS,
    PADDED,
    SCALAR,
    SHIFTED,
    SINK,
    SOFTCAP,
    WINDOW,
    Case,
)

pytest.importorskip("triton")
from stem_compile.kernels.targets.cuda import device
from stem_compile.kernels.targets.cuda import target as cuda
from stem_compile.kernels.targets.cuda.masses import Means

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: Any) -> None:
    """Persistent kernels take several items each, as they do at real sizes."""
    monkeypatch.setattr(device, "multiprocessors", lambda _: 5)


def spec(groups: tuple[int, int] = (8, 8), **changes: Any) -> SelectionSpec:
    plain = SelectionSpec(
        budget=0.3,
        pooling="mass",
        stride=groups[0],
        key_stride=groups[1],
        sink_blocks=1,
        local_blocks=2,
        share="heads",
    )
    return dataclasses.replace(plain, **changes)


def case(length: int = 4100, **changes: Any) -> Case:
    plain = Case(
        q_len=length,
        kv_len=length,
        heads=4,
        key_heads=2,
        head_dim=128,
        value_dim=128,
        dtype=torch.bfloat16,
        device="cuda",
    )
    return dataclasses.replace(plain, **changes)


def check(attention: Attention, selection_spec: SelectionSpec, hopper: bool, tolerance: float = 0.01) -> None:
    """Scores within ``tolerance`` of the definition's in fp64; lists those that the scores ask for; twice alike."""
    exact = dataclasses.replace(attention, **{name: getattr(attention, name).double() for name in ("q", "k", "v")})
    expected = log_masses(exact)
    pairs = attention.candidates.expand(expected.shape)
    means = Means(attention)
    assert means.hopper == (hopper and torch.cuda.get_device_capability()[0] == 9)
    scores = torch.where(pairs, means.scores(0, expected.shape[2]), -torch.inf)
    assert not scores.isnan().any()
    gap = (scores - expected)[pairs & (expected > -60)].abs()
    assert not gap.numel() or float(gap.max()) < tolerance, f"scores are {float(gap.max()):.4f} off"
    lists = attention.selection(*cuda.select(attention, "select"))
    lists.check(attention.candidates)
    wanted = tpd.tpd_select(scores, selection_spec, attention.reach, attention.k.shape[1])
    assert torch.equal(lists.counts == FULL, wanted.counts == FULL)
    assert torch.equal(lists.dense(attention.candidates), wanted.dense(attention.candidates))
    again = attention.selection(*cuda.select(attention, "select"))
    assert torch.equal(lists.counts, again.counts)


@pytest.mark.parametrize("block_k", [128, 64, 32])
@pytest.mark.parametrize("groups", [(8, 8), (4, 8), (4, 4), (8, 4), (2, 8)])
def test_selection_by_mass(groups: tuple[int, int], block_k: int) -> None:
    if block_k // groups[1] < 4:
        pytest.skip("fewer groups a block than the Hopper kernel takes")
    selection_spec = spec(groups, block_k=block_k)
    check(case().attention(spec_text=selection_spec.text()), selection_spec, hopper=True)


@pytest.mark.parametrize("share", ["none", "group"])
@pytest.mark.parametrize("length", [1, 130, 2048, 8192])
def test_mass_at_lengths(length: int, share: str) -> None:
    selection_spec = spec(share=share)
    check(case(length, batch=2).attention(spec_text=selection_spec.text()), selection_spec, hopper=True)


@pytest.mark.parametrize("layout", ["bnhd", "sliced"])
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_mass_at_head_dims(dim: int, layout: str) -> None:
    selection_spec = spec((4, 8))
    check(
        case(head_dim=dim, layout=layout, dtype=torch.float16).attention(spec_text=selection_spec.text()),
        selection_spec,
        True,
    )


@pytest.mark.parametrize("mask", [SCALAR, LAST_ROWS, SHIFTED, "True"])
@pytest.mark.parametrize("kind", ["", SINK])
def test_mass_of_a_chunk(mask: str, kind: str) -> None:
    selection_spec = spec()
    check(
        case(2100, kv_len=4200, mask=mask, kind=kind).attention(spec_text=selection_spec.text()),
        selection_spec,
        hopper=True,
    )


@pytest.mark.parametrize("mask", [PADDED, WINDOW])
@pytest.mark.parametrize("kind", ["", SOFTCAP, ALIBI])
def test_mass_under_other_masks(mask: str, kind: str) -> None:
    selection_spec = spec()
    check(
        case(mask=mask, kind=kind, batch=2).attention(spec_text=selection_spec.text()),
        selection_spec,
        False,
        tolerance=0.05,
    )


@pytest.mark.parametrize("factor", [1.0, -1.0, 60.0])
@pytest.mark.parametrize("bias", [0.0, 40.0])
def test_mass_of_large_scores(factor: float, bias: float) -> None:
    """Scores beyond the exponents of float32, as rows with a maximum of their own, and keys with much in common."""
    selection_spec = spec()
    attention = case().attention(spec_text=selection_spec.text())
    changed = dataclasses.replace(attention, k=attention.k + bias, scale=attention.scale * factor)
    exact = log_masses(dataclasses.replace(changed, q=changed.q.double(), k=changed.k.double(), v=changed.v.double()))
    means = Means(changed)
    scores = means.scores(0, exact.shape[2])
    near = changed.candidates.expand(exact.shape) & (exact > -20)
    # A rounding of a mean is worth as much more as scores are larger.
    assert float((scores - exact)[near].abs().max()) < 0.01 * max(1.0, abs(factor)) * (1 + bias)
    assert scores[near].isfinite().all()


def test_mass_is_blind_to_later_tokens() -> None:
    selection_spec = spec(prompt_length=4096)
    attention = case(4096).attention(spec_text=selection_spec.text())
    whole = Means(attention).scores(0, 32)
    part = dataclasses.replace(
        attention, q=attention.q[:, :, :2048], k=attention.k[:, :, :2048], v=attention.v[:, :, :2048]
    )
    scores = Means(part).scores(0, 16)
    pairs = part.candidates.expand(scores.shape)
    assert torch.equal(scores[pairs], whole[:, :, :16, :16][pairs])


@pytest.mark.parametrize("mask", [CAUSAL])
def test_mass_in_row_chunks(mask: str) -> None:
    attention = case(4100, mask=mask).attention(spec_text=spec().text())
    whole = Means(attention).scores(0, 33)
    pairs = attention.candidates.expand(whole.shape)
    means = Means(attention)
    parts = torch.cat([means.scores(0, 16), means.scores(16, 17)], 2)
    assert torch.equal(parts[pairs], whole[pairs])


@pytest.mark.parametrize("bias", [0.0, 30.0])
@pytest.mark.parametrize("groups", [(8, 8), (4, 4)])
def test_mass_from_fp8(groups: tuple[int, int], bias: float) -> None:
    """Scores from e4m3 means are near the definition's: a block is rarely another, and then about as good."""
    selection_spec = spec(groups, score_dtype="fp8")
    attention = case().attention(spec_text=selection_spec.text())
    attention = dataclasses.replace(attention, k=attention.k + bias)
    expected = log_masses(attention)
    pairs = attention.candidates.expand(expected.shape)
    means = Means(attention)
    scores = torch.where(pairs, means.scores(0, expected.shape[2]), -torch.inf)
    gap = (scores - expected)[pairs].abs()
    assert float(gap.mean()) < 0.02 and float(gap.max()) < 0.3, (float(gap.mean()), float(gap.max()))
    lists = attention.selection(*cuda.select(attention, "select")).dense(attention.candidates)
    exact = tpd.tpd_select(expected, selection_spec, attention.reach, attention.k.shape[1]).dense(attention.candidates)
    assert float((lists & exact).sum() / exact.sum()) > 0.9
    if torch.cuda.get_device_capability()[0] == 9:
        assert means.keys.dtype == torch.float8_e4m3fn
