"""Which tokens of a sequence each rank of a process group holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

ORDERS = ("zigzag", "contiguous")
"""How a sequence is split. "zigzag": 2 R chunks, of which rank r holds numbers r and 2 R - 1 - r, so that each rank has
early rows, which see few keys, and late ones. "contiguous": R chunks, one each."""


class SplitError(ValueError):
    """A process group, an order or a length that tokens cannot be split by."""


@dataclass(frozen=True)
class TokenSplit:
    """How one sequence lies on the ranks of a process group. Frozen and hashable.

    group: name of the process group, as torch's functional collectives know it. rank: this process's in the group;
    ranks: its size. order: one of ``ORDERS``. table: numbers of the chunks that each rank holds, equally many each, in
    place of an order's (``distributed.balanced`` makes one); empty: the order's.
    """

    group: str
    rank: int
    ranks: int
    order: str = "zigzag"
    table: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, mesh: Any, order: str = "zigzag") -> TokenSplit:
        """Split over a 1-D ``DeviceMesh`` or a ``ProcessGroup`` (of which this process is a member). A split is
        returned as it is. Raises SplitError for anything else."""
        if isinstance(mesh, cls):
            return mesh
        if order not in ORDERS:
            raise SplitError(f"context_parallel_order={order!r} is not one of {', '.join(map(repr, ORDERS))}")
        group = mesh
        if hasattr(mesh, "get_group") and hasattr(mesh, "ndim"):
            if mesh.ndim != 1:
                names = mesh.mesh_dim_names or tuple(range(mesh.ndim))
                raise SplitError(
                    f"context_parallel: a mesh of {mesh.ndim} dimensions {names}; give the one that tokens are split"
                    f" over, such as mesh[{names[0]!r}]"
                )
            group = mesh.get_group()
        if not isinstance(group, dist.ProcessGroup):
            raise SplitError(f"context_parallel={mesh!r}: a 1-D torch.distributed DeviceMesh or a ProcessGroup")
        return cls(group.group_name, dist.get_rank(group), dist.get_world_size(group), order)

    @property
    def chunks(self) -> int:
        """Chunks of equal length that the sequence is cut into."""
        return len(self.held) * self.ranks

    @property
    def held(self) -> tuple[int, ...]:
        """Numbers of the chunks that this rank holds, in the order in which it holds them."""
        return self.held_by(self.rank)

    def held_by(self, rank: int) -> tuple[int, ...]:
        """Numbers of the chunks that a rank holds."""
        if self.table:
            return self.table[rank]
        return (rank, 2 * self.ranks - 1 - rank) if self.order == "zigzag" else (rank,)

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """(rank, place among its chunks) of each chunk, in the order of the sequence."""
        by_chunk = {
            number: (rank, place) for rank in range(self.ranks) for place, number in enumerate(self.held_by(rank))
        }
        return tuple(by_chunk[number] for number in range(self.chunks))

    def chunk_length(self, local: int) -> int:
        """Tokens a chunk where a rank holds ``local`` tokens. Raises SplitError where they are no whole number."""
        if local % len(self.held):
            raise SplitError(
                f"{local} tokens on a rank are not {len(self.held)} chunks of equal length: split the sequence with"
                " stem_compile.distributed.shard, which pads it"
            )
        return local // len(self.held)

    def gathered(self, stacked: torch.Tensor, dim: int) -> torch.Tensor:
        """The ranks' tensors in the order of the sequence.

        stacked: [R, ...], each rank's tensor with its tokens in dimension ``dim`` of [...]. Returns [...] with R times
        as many tokens.
        """
        pieces = stacked.chunk(len(self.held), dim + 1)
        return torch.cat([pieces[place][rank] for rank, place in self.places], dim)

    def part(self, whole: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's tokens of a tensor that holds all of them in dimension ``dim``: ``gathered``'s inverse."""
        size = whole.shape[dim]
        if size % self.chunks:
            raise SplitError(f"{size} tokens are not {self.chunks} chunks of equal length")
        pieces = whole.chunk(self.chunks, dim)
        return torch.cat([pieces[n] for n in self.held], dim)
