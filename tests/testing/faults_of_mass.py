"""Faults of pooled mass: groups, the mass that they hold, budgets that heads share, packed lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from stem_compile.kernels.targets.cpu import masses
from stem_compile.selection import FULL
from tests.testing.plants import Patch, attend, fault


def means(patch: Patch, change: Callable[[Any], None]) -> None:
    """Change the groups of an attention after they were pooled."""

    class Wrong(masses._Masses):
        def __init__(self, attention: Any) -> None:
            super().__init__(attention)
            change(self)

    patch.setattr(masses, "_Masses", Wrong)


def divided(patch: Patch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change how many blocks each head gets, int32 [B, H, rows]; rows that compute everything stay."""
    right = masses.divided_counts

    def wrong(*args: Any) -> torch.Tensor:
        counts = right(*args)
        return torch.where(counts == FULL, counts, change(counts).to(counts.dtype))

    patch.setattr(masses, "divided_counts", wrong)


def weighed(patch: Patch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Heads divide their budgets by other scores [B, H, rows, key blocks] than the blocks are ranked by."""
    right = masses.divided_counts
    patch.setattr(masses, "divided_counts", lambda scores, *args: right(change(scores), *args))


@fault("a shared budget leaks between the rows of a batch", "batch-invariance")
def _(patch: Patch) -> None:
    weighed(patch, lambda scores: scores.mean(0, keepdim=True).expand_as(scores))


@fault("the mass of batch row 0 is used for all rows", "batch-invariance")
def _(patch: Patch) -> None:
    def first(groups: Any) -> None:
        groups.keys = groups.keys._replace(mean=groups.keys.mean[:1].expand_as(groups.keys.mean))

    means(patch, first)


@fault("a row's budget is divided by the mass of the row after it", "block-causality")
def _(patch: Patch) -> None:
    weighed(patch, lambda scores: torch.where(scores > -torch.inf, scores.roll(-1, 2), scores))


@fault("query groups are read one group late", "block-causality")
def _(patch: Patch) -> None:
    def late(groups: Any) -> None:
        groups.queries = groups.queries._replace(mean=groups.queries.mean.roll(-1, 2))

    means(patch, late)


@fault("query groups are read one group late behind a cached prefix", "prefix-invariance")
def _(patch: Patch) -> None:
    def late(groups: Any) -> None:
        if groups.attention.shape[3] > groups.attention.shape[2]:
            groups.queries = groups.queries._replace(mean=groups.queries.mean.roll(-1, 2))

    means(patch, late)


@fault("key groups are read one group late", "block-causality")
def _(patch: Patch) -> None:
    def late(groups: Any) -> None:
        groups.keys = groups.keys._replace(mean=groups.keys.mean.roll(-1, 2))

    means(patch, late)


@fault("a key group that the causal edge cuts counts whole", "block-causality")
def _(patch: Patch) -> None:
    right = masses.counting
    patch.setattr(masses, "counting", lambda *args: torch.ones_like(right(*args)))


@fault("packed lists begin one block late", "budget")
def _(patch: Patch) -> None:
    right = masses.packed
    patch.setattr(masses, "packed", lambda *args: right(*args).roll(1, -1))


@fault("packed lists are read one block late", "kernel-exactness")
def _(patch: Patch) -> None:
    attend(patch, indices=lambda c: c["indices"].roll(1, -1))


@fault("packed lists are read by another head's counts", "kernel-exactness")
def _(patch: Patch) -> None:
    attend(patch, counts=lambda c: c["counts"].roll(1, 1))


@fault("every head takes what the greediest takes", "budget")
def _(patch: Patch) -> None:
    divided(patch, lambda counts: counts.amax(1, keepdim=True).expand_as(counts))


@fault("every head takes what the most modest takes", "budget")
def _(patch: Patch) -> None:
    divided(patch, lambda counts: counts.amin(1, keepdim=True).expand_as(counts))


@fault("heads take one block of a shared budget twice", "budget")
def _(patch: Patch) -> None:
    divided(patch, lambda counts: counts + 1)


@fault("budgets are divided by a race", "determinism")
def _(patch: Patch) -> None:
    generator = torch.Generator().manual_seed(0)
    weighed(patch, lambda scores: scores + 8 * torch.rand(scores.shape, generator=generator))


@fault("the mass of hidden keys counts", "padding-invariance")
def _(patch: Patch) -> None:
    right = masses.grouped
    patch.setattr(masses, "grouped", lambda x, visible, *args: right(x, None, *args))


@fault("a group that straddles padding weighs as a whole one", "padding-invariance")
def _(patch: Patch) -> None:
    means(patch, lambda groups: setattr(groups, "weights", None))
