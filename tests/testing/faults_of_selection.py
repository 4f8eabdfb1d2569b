"""Faults of the selection: which blocks are computed."""

from __future__ import annotations

from typing import Any

import torch

from stem_compile import selection
from stem_compile.algebra import masks
from stem_compile.selection import FULL
from tests.testing.plants import Call, Patch, attend, fault, lists, respecified, select


@fault("a race now and then loses a head's last block", "determinism")
def _(patch: Patch) -> None:
    generator = torch.Generator().manual_seed(0)
    attend(
        patch,
        counts=lambda c: torch.where(
            (c["counts"] > 1) & (torch.rand((), generator=generator) < 0.5), c["counts"] - 1, c["counts"]
        ),
    )


@fault("selection is not deterministic", "determinism")
def _(patch: Patch) -> None:
    generator = torch.Generator().manual_seed(0)
    select(patch, q=lambda c: torch.randn(c["q"].shape, generator=generator))


@fault("block scores normalised over the whole sequence", "block-causality")
def _(patch: Patch) -> None:
    select(patch, spec=respecified(metric="released", beta=5.0))


@fault("block scores averaged over the batch", "batch-invariance")
def _(patch: Patch) -> None:
    select(patch, q=lambda c: c["q"].mean(0, keepdim=True).expand_as(c["q"]))


@fault("a selection of an earlier call is used again", "batch-invariance")
def _(patch: Patch) -> None:
    kept: dict[Any, Any] = {}
    lists(
        patch,
        lambda c, indices, counts: kept.setdefault((tuple(c["q"].shape), tuple(indices.shape)), (indices, counts)),
    )


@fault("the budget is not kept", "budget")
def _(patch: Patch) -> None:
    select(patch, spec=respecified(budget=0.9))


@fault("the budget is not used up", "budget")
def _(patch: Patch) -> None:
    select(patch, spec=respecified(budget=0.1))


@fault("sinks are forgotten", "budget")
def _(patch: Patch) -> None:
    select(patch, spec=respecified(sink_blocks=0))


@fault("the diagonal block is not kept", "budget")
def _(patch: Patch) -> None:
    lists(patch, lambda c, indices, counts: (indices, torch.where(counts > 1, counts - 1, counts)))


@fault("a block is listed twice", "budget")
def _(patch: Patch) -> None:
    lists(
        patch,
        lambda c, indices, counts: (torch.cat([indices[..., :1], indices[..., :1], indices[..., 2:]], -1), counts),
    )


@fault("a block after the diagonal is listed", "budget")
def _(patch: Patch) -> None:
    def beyond(c: Call, indices: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        last = torch.arange(indices.shape[-1]) == counts[..., None] - 1
        return torch.where(last, -(-c["k"].shape[2] // selection.parse(c["spec"]).block_k) - 1, indices), counts

    lists(patch, beyond)


@fault("keys that nobody sees are pooled into block scores", "hidden-keys")
def _(patch: Patch) -> None:
    def pooled(c: Call) -> torch.Tensor:
        group = c["q"].shape[1] // c["k"].shape[1]
        return c["q"] + c["k"].sum(2, keepdim=True).repeat_interleave(group, 1)  # type: ignore[no-any-return]

    select(patch, q=pooled)


@fault("the budget is spent on padding", "padding-invariance")
def _(patch: Patch) -> None:
    def unpadded(c: Call) -> str:
        mask = masks.decode(c["mask"])
        return (
            masks.encode(next(t for t in mask.terms if isinstance(t, masks.Causal)))
            if isinstance(mask, masks.And)
            else c["mask"]
        )

    select(patch, mask=unpadded)


@fault("chunks select by their own length, not the prompt's", "prefix-invariance")
def _(patch: Patch) -> None:
    select(patch, spec=respecified(prompt_length=0))


@fault("a chunk's selection starts at the prompt's beginning", "prefix-invariance")
def _(patch: Patch) -> None:
    def beginning(c: Call, indices: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        behind = c["k"].shape[2] - c["q"].shape[2]
        shift = behind // selection.parse(c["spec"]).block_k
        return ((indices - shift).clamp(min=0) if shift and bool((counts != FULL).any()) else indices), counts

    lists(patch, beginning)
