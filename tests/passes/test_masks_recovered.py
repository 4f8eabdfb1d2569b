"""Mask recovery: what is read from a graph equals the mask that the graph computes, or says that it is opaque."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from stem_compile.masks import And, Causal, Padding
from stem_compile.sites import AttentionSite, Reason, Rejected, value
from tests.passes.capture import rewritten
from tests.passes.programs import Program, programs


def _agrees(program: Program, dynamic: bool | None) -> AttentionSite | Rejected:
    inputs = program.inputs()
    result, out = rewritten(program, inputs, dynamic=dynamic)
    expected = program(*inputs)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    return result.found[0]


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
    """Rows that see no key too: the mean of all values where hidden scores are finite, 0 where they are -inf or there is a Boolean mask."""
    inputs = program.inputs()
    result, out = rewritten(program, inputs, dynamic=False)
    hit = result.found[0]
    assert isinstance(hit, AttentionSite), f"{program}: {hit.words}"
    assert not any(sum(n > 1 for n in value(t).shape[1:]) > 1 for t in hit.tensors), hit.words
    torch.testing.assert_close(out, program(*inputs), rtol=1e-4, atol=1e-5)


@settings(max_examples=25)
@given(programs(wide=True))
def test_wider_masks_are_right_for_symbolic_sizes(program: Program) -> None:
    inputs = program.inputs()
    result, out = rewritten(program, inputs, dynamic=True)
    torch.testing.assert_close(out, program(*inputs), rtol=1e-4, atol=1e-5)
    assert isinstance(result.found[0], AttentionSite) or result.found[0].reason is Reason.MASK


@settings(max_examples=15)
@given(programs())
def test_recovered_masks_are_right_for_symbolic_sizes(program: Program) -> None:
    hit = _agrees(program, dynamic=True)
    assert isinstance(hit, AttentionSite) or hit.reason is Reason.MASK


def _qkv(n: int = 40) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(1, 2, n, 16) for _ in range(3))


def _unread(build: Any) -> Any:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=build(torch.arange(40)[:, None], torch.arange(40)[None, :]))


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
    "outer product": lambda q, k: torch.einsum("i,j->ij", torch.ones(40), (torch.arange(40) % 5 != 2).float()).tril() != 0,
}


@pytest.mark.parametrize("name", READ)
def test_masks_beyond_causal_are_rewritten_and_right(name: str) -> None:
    inputs = _qkv()
    torch.manual_seed(0)
    result, out = rewritten(_unread(READ[name]), inputs)
    assert len(result.sites) == 1
    torch.manual_seed(0)
    torch.testing.assert_close(out, _unread(READ[name])(*inputs), rtol=1e-4, atol=1e-5)


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
    assert isinstance(result.found[0], Rejected)
    torch.testing.assert_close(out, model(*inputs))


def test_a_padding_mask_written_in_place_is_not_believed() -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        seen = keep.clone()
        mask = (torch.arange(40)[None, :] <= torch.arange(40)[:, None]) & seen[:, None, None, :]
        seen.fill_(True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    inputs = (*_qkv(), torch.arange(40)[None, :] > 9)
    result, out = rewritten(model, inputs)
    assert isinstance(result.found[0], Rejected)
    torch.testing.assert_close(out, model(*inputs))


def test_packed_positions_fold_to_nothing() -> None:
    """transformers compares document ids that it derives from position ids; for positions 0..n-1 all are one document."""

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
    torch.testing.assert_close(out, model(*inputs), rtol=1e-4, atol=1e-5)


def test_no_tensor_of_n_by_n_is_left() -> None:
    program = Program()
    result, _ = rewritten(program, program.inputs())
    shapes = [tuple(value(n).shape) for n in result.module.graph.nodes if isinstance(value(n), torch.Tensor)]
    assert not [s for s in shapes if s[-2:] == (20, 20)]
