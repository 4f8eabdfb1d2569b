"""Mask recovery: what is read from a graph equals the mask that the graph computes, or says that it is opaque."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from stem_compile.algebra.masks import And, Causal, Padding
from stem_compile.passes.graph.sites import AttentionSite, Rejected
from stem_compile.passes.graph.values import value
from stem_compile.reasons import Reason
from tests.numerics import assert_close
from tests.passes.capture import rewritten
from tests.passes.reading.programs import Program, programs


def _agrees(program: Program, dynamic: bool | None) -> AttentionSite | Rejected:
    inputs = program.inputs()
    result, out = rewritten(program, inputs, dynamic=dynamic)
    expected = program(*inputs)
    assert_close(out, expected)
    return result.attentions[0]


@settings(max_examples=40)
@given(programs())
def test_recovered_masks_are_right(program: Program) -> None:
    hit = _agrees(program, dynamic=False)
    assert isinstance(hit, AttentionSite), f"{program}: {hit.words}"
    terms = hit.mask.terms if isinstance(hit.mask, And) else (hit.mask,)
    assert Causal(program.prefix) in terms
    assert any(isinstance(t, Padding) for t in terms) == (program.padding != "absent")


@settings(max_examples=60)
@given(programs(wide=True))
def test_wider_masks_are_right_and_leave_no_square(program: Program) -> None:
    """Rows that see no key too: the mean of all values where hidden scores are finite, 0 where they are -inf or there
    is a Boolean mask."""
    inputs = program.inputs()
    result, out = rewritten(program, inputs, dynamic=False)
    hit = result.attentions[0]
    assert isinstance(hit, AttentionSite), f"{program}: {hit.words}"
    assert not any(sum(n > 1 for n in value(t).shape[1:]) > 1 for t in hit.tensors), hit.words
    assert_close(out, program(*inputs))


@settings(max_examples=25)
@given(programs(wide=True))
def test_wider_masks_are_right_for_symbolic_sizes(program: Program) -> None:
    inputs = program.inputs()
    result, out = rewritten(program, inputs, dynamic=True)
    assert_close(out, program(*inputs))
    assert isinstance(result.attentions[0], AttentionSite) or result.attentions[0].reason is Reason.MASK


@settings(max_examples=15)
@given(programs())
def test_recovered_masks_are_right_for_symbolic_sizes(program: Program) -> None:
    hit = _agrees(program, dynamic=True)
    assert isinstance(hit, AttentionSite) or hit.reason is Reason.MASK


def _qkv(n: int = 40) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(1, 2, n, 16) for _ in range(3))


def _unread(build: Any) -> Any:
    return lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=build(torch.arange(40)[:, None], torch.arange(40)[None, :])
    )


READ = {
    "causal & sliding window of 8": lambda q, k: (k <= q) & (k > q - 8),
    "causal & sliding window of 9": lambda q, k: (q - k >= 0) & ((q - k) // 3 < 3),
    "causal & chunks of 8": lambda q, k: (q // 8 == k // 8) & (k <= q),
    "causal | [kv < 4]": lambda q, k: (k <= q) | (k < 4),
    "causal & (sliding | sinks)": lambda q, k: (k <= q) & ((k > q - 8) | (k < 2)),
    "[3*kv <= 3*q]": lambda q, k: k * 3 <= q * 3,
    "given as a tensor": lambda q, k: torch.roll(k <= q, 1, 0),
    "xor of positions": lambda q, k: (q ^ k) <= q,
    "random": lambda q, k: (torch.rand(40, 40) < 0.5) & (k <= q),
    "division": lambda q, k: k / 3 <= q / 3,
    "causal & window by a product": lambda q, k: torch.ones(40, 40).tril() * torch.ones(40, 40).triu(-7) > 0,
    "causal & window by a sum": lambda q, k: (k <= q).int() + (k > q - 8).int() == 2,
    "causal & window by a difference": lambda q, k: torch.ones(40, 40).tril() - torch.ones(40, 40).tril(-8) != 0,
    "a place counted from the end": lambda q, k: (
        ((torch.arange(40)[torch.arange(40) - 1][None, :] <= q) & (k <= q)) | (q == k)
    ),
    "positions that wrap": lambda q, k: ((k * 7).to(torch.int8) <= (q * 7).to(torch.int8)) | (q == k),
    "a prefix in a choice": lambda q, k: torch.where(
        k < 5, 0.0, torch.where(k <= q, 0.0, torch.finfo(torch.float32).min)
    ),
    "outer product": lambda q, k: (
        torch.einsum("i,j->ij", torch.ones(40), (torch.arange(40) % 5 != 2).float()).tril() != 0
    ),
}


@pytest.mark.parametrize("name", READ)
def test_masks_beyond_causal_are_rewritten_and_right(name: str) -> None:
    inputs = _qkv()
    torch.manual_seed(0)
    result, out = rewritten(_unread(READ[name]), inputs)
    assert len(result.sites) == 1
    torch.manual_seed(0)
    assert_close(out, _unread(READ[name])(*inputs))


# Masks of ids that only the run knows, in every dtype that ids are kept in.
IDS: dict[str, Any] = {
    "in order": lambda ids, n: ids[None, :] <= ids[:, None],
    "widened": lambda ids, n: ids.long()[None, :] * 2 + 200 <= ids.long()[:, None] * 2 + 200,
    "shifted": lambda ids, n: (
        (ids[torch.arange(n) - 5][None, :] == ids[:, None]) & (torch.arange(n)[None, :] <= torch.arange(n)[:, None])
    ),
    "places that are data": lambda ids, n: ids[ids.long() % n - 3][None, :] <= ids[:, None],
}


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int64], ids=str)
@pytest.mark.parametrize("name", IDS)
def test_ids_are_compared_as_numbers_of_any_dtype(name: str, dtype: torch.dtype) -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=IDS[name](ids, 40) | torch.eye(40, dtype=torch.bool))

    limits = torch.iinfo(dtype)
    ids = torch.linspace(max(limits.min, -1000), min(limits.max, 1000), 40).to(dtype)[
        torch.randperm(40, generator=torch.Generator().manual_seed(0))
    ]
    inputs = (*_qkv(), ids)
    result, out = rewritten(model, inputs)
    assert len(result.attentions) == 1
    assert_close(out, model(*inputs))


def test_positions_that_half_precision_rounds_keep_their_rounding() -> None:
    """They are loaded as the graph rounds them: as exact numbers the mask would be causal."""
    model = _unread(lambda q, k: (k + 256).to(torch.bfloat16) <= (q + 256).to(torch.bfloat16))
    inputs = _qkv()
    result, out = rewritten(model, inputs)
    assert [len(site.tensors) for site in result.sites] == [2]
    assert_close(out, model(*inputs))
    assert (out - F.scaled_dot_product_attention(*inputs, is_causal=True)).abs().max() > 1e-2


NAMED = ("causal & sliding window of 8", "causal & chunks of 8", "given as a tensor")


@pytest.mark.parametrize("name", NAMED)
def test_masks_are_told_in_words(name: str) -> None:
    result, _ = rewritten(_unread(READ[name]), _qkv())
    assert [s.words for s in result.sites] == [name]


def test_a_mask_written_in_place_is_not_believed() -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        mask = torch.arange(40)[None, :] <= torch.arange(40)[:, None]
        mask[:, 7] = False
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    inputs = _qkv()
    result, out = rewritten(model, inputs)
    assert isinstance(result.attentions[0], Rejected)
    torch.testing.assert_close(out, model(*inputs))


def test_a_padding_mask_written_in_place_is_not_believed() -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        padding = keep.clone()
        mask = (torch.arange(40)[None, :] <= torch.arange(40)[:, None]) & padding[:, None, None, :]
        padding.fill_(True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    inputs = (*_qkv(), torch.arange(40)[None, :] > 9)
    result, out = rewritten(model, inputs)
    assert isinstance(result.attentions[0], Rejected)
    torch.testing.assert_close(out, model(*inputs))


def test_packed_positions_fold_to_nothing() -> None:
    """transformers compares document ids that it derives from position ids; for positions 0..n-1 all are one
    document."""

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(q.shape[2])[None, :]
        first = positions[:, :1]
        ids = (positions.diff(prepend=first - 1, dim=-1) != 1).cumsum(-1)
        rows = torch.arange(q.shape[2])
        same = (
            ids[torch.zeros(1, 1, 1, 1, dtype=torch.long), rows[None, None, :, None]]
            == ids[torch.zeros(1, 1, 1, 1, dtype=torch.long), rows[None, None, None, :]]
        )
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(rows[None, :] <= rows[:, None]) & same)

    inputs = _qkv()
    result, out = rewritten(model, inputs)
    assert [s.words for s in result.sites] == ["causal"]
    assert_close(out, model(*inputs))


def test_no_tensor_of_n_by_n_is_left() -> None:
    program = Program()
    result, _ = rewritten(program, program.inputs())
    shapes = [tuple(value(n).shape) for n in result.module.graph.nodes if isinstance(value(n), torch.Tensor)]
    assert not [s for s in shapes if s[-2:] == (20, 20)]
