"""Case: the small record from which an example is made. A failing check shrinks to one and prints it, so that it can be
pasted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class Case:
    """One example. pad: pad tokens of the last row, on ``side``; the other rows have none. style: "ids" or "embeds"
    (inputs_embeds).

    cut: a place in the sequence whose meaning is the property's (tokens before it, or tokens a chunk). given: inputs
    drawn by a user's own strategy.
    """

    length: int = 64
    batch: int = 1
    seed: int = 0
    pad: int = 0
    side: str = "left"
    style: str = "ids"
    positions: bool = False
    cut: int = 0
    given: Any = None

    def __repr__(self) -> str:
        default = {f.name: f.default for f in dataclasses.fields(self)}
        shown = (
            f"{k}={getattr(self, k)!r}"
            for k in default
            if k in ("length", "batch", "seed") or getattr(self, k) != default[k]
        )
        return f"Case({', '.join(shown)})"


@dataclass(frozen=True, eq=False)
class Inputs:
    """Arguments of one call. valid: bool [batch, length], positions whose output has a meaning; None is all. Hashed by
    identity, so that runs can be cached."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    valid: torch.Tensor | None = None

    def tensors(self, change: Any) -> Inputs:
        """The same with ``change`` applied to every tensor."""
        args, kwargs = tree_map(lambda x: change(x) if isinstance(x, torch.Tensor) else x, (self.args, self.kwargs))
        return Inputs(args, kwargs, None if self.valid is None else change(self.valid))

    def row(self, index: int, batch: int) -> Inputs:
        """One batch row alone."""
        return self.tensors(lambda x: packed(x[index : index + 1]) if x.dim() and len(x) == batch else x)

    def unpadded(self) -> Inputs:
        """Without the mask and the positions that padding needs."""
        return Inputs(self.args, {k: v for k, v in self.kwargs.items() if k not in ("attention_mask", "position_ids")})

    def spliced(self, other: Inputs, at: int, length: int) -> Inputs:
        """These tokens up to ``at``, the other's from there."""
        mine, theirs = (
            [x for x in torch.utils._pytree.tree_leaves((i.args, i.kwargs)) if isinstance(x, torch.Tensor)]
            for i in (self, other)
        )
        pairs = iter(zip(mine, theirs))

        def joined(_: torch.Tensor) -> torch.Tensor:
            a, b = next(pairs)
            return torch.cat([a[:, :at], b[:, at:]], 1) if a.dim() > 1 and a.shape[1] == length else a

        args, kwargs = tree_map(lambda x: joined(x) if isinstance(x, torch.Tensor) else x, (self.args, self.kwargs))
        return Inputs(args, kwargs, self.valid)


def packed(x: torch.Tensor) -> torch.Tensor:
    """The same in memory of its own: Dynamo would trace anew for the strides of a part, also where a size of 1 makes
    them meaningless."""
    return x.clone(memory_format=torch.contiguous_format)
