"""Which key blocks each query block computes.

``BlockSelection`` is what a policy returns and what every kernel consumes. Rows of 128 queries (``block_q``) list the
key blocks (``block_k`` keys each) they compute, ascending. A row that computes every block its mask leaves visible
carries ``FULL`` instead of a list: early rows, the last row and everything at ``budget=1.0`` are such rows, so they
cost no index memory and no index loads.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache

import torch

OptionValue = bool | int | float | str
"""Value of an option that a policy adds."""

POINT = 1 << 10
"""Denominator of ``SelectionSpec.kept_share``."""

FULL = -1
"""Count of a row that computes every block of its candidates."""
ALL = -1
"""Reach of a row that is to compute every block of its candidates, whatever its budget."""


@dataclass(frozen=True)
class SelectionSpec:
    """Everything a selection depends on besides tensors. Hashable; ``text()`` is its form in FX graphs and operator
    schemas.

    budget: fraction of the visible block pairs, None for the published schedule. mu, beta: Eq. 3 and Eq. 7. metric:
    "paper" (Eq. 7) or "released" (z-scored norms). pooling: "mean" (linear summaries) or "max" over anti-diagonal
    cells, or "mass" (``mass.py``). stride: tokens a group; key_stride: keys a group under mass pooling, 0 = stride.
    share: heads that share a row's budget under mass pooling, "none", "heads" (all) or "group" (of one key head); kept:
    part of its own that each keeps. coverage: share of a row's mass at which it stops, ``budget`` being the most; None
    = the budget.
    score_dtype: "native", or "fp8" for max or mass pooling where the device has such matrix units.
    sink_blocks, local_blocks: always kept, in blocks of ``block_q``. prompt_length: full length when the prompt arrives
    in chunks, 0 = this call's. options: the policy's own, as sorted (name, value) pairs; ``option`` reads one.
    """

    policy: str = "stem"
    budget: float | None = None
    mu: float = 0.7
    beta: float = 0.2
    metric: str = "paper"
    pooling: str = "mean"
    stride: int = 16
    score_dtype: str = "native"
    block_q: int = 128
    block_k: int = 128
    sink_blocks: int = 4
    local_blocks: int = 4
    prompt_length: int = 0
    key_stride: int = 0
    share: str = "none"
    kept: float = 0.5
    coverage: float | None = None
    options: tuple[tuple[str, OptionValue], ...] = ()

    def text(self) -> str:
        """Canonical text, ``parse``'s inverse: only what differs from the defaults."""
        default = asdict(SelectionSpec())
        fields = {k: v for k, v in asdict(self).items() if k != "options" and v != default[k]}
        return ",".join(f"{k}={v}" for k, v in {**fields, **dict(sorted(self.options))}.items())

    def option(self, name: str) -> OptionValue:
        """Value of an option of the policy's own, its default where none is set. Raises KeyError for a name that the
        policy does not have."""
        from stem_compile.selection import policies

        return dict(self.options)[name] if name in dict(self.options) else policies.options(self.policy)[name].default

    @property
    def group_sizes(self) -> tuple[int, int]:
        """Queries and keys a group under mass pooling: at most a block."""
        return min(self.stride, self.block_q), min(self.key_stride or self.stride, self.block_k)

    @property
    def kept_share(self) -> int:
        """``kept`` in ``POINT``-ths: integers, so that every device rounds alike."""
        return round(self.kept * POINT)

    @property
    def divides(self) -> bool:
        """Whether a row's length is decided by its scores: heads share budgets, or a share of the mass is asked for."""
        return self.share != "none" or self.coverage is not None

    def sharing_heads(self, heads: int, key_heads: int) -> int:
        """How many consecutive query heads share a row's budget."""
        return {"none": 1, "heads": heads, "group": heads // key_heads}[self.share]

    @property
    def sinks(self) -> int:
        """First candidates always kept, in key blocks."""
        return self.sink_blocks * max(1, self.block_q // self.block_k)

    @property
    def locals(self) -> int:
        """Last candidates always kept, in key blocks. Covers the diagonal, which spans one key block more under an
        unaligned prefix."""
        span = max(1, self.block_q // self.block_k)
        return max(self.local_blocks * span, span + 1)


@lru_cache(maxsize=256)
def parse(text: str) -> SelectionSpec:
    """``SelectionSpec`` of ``SelectionSpec.text()``. Raises ValueError for names that neither it nor its policy has."""
    fields = asdict(SelectionSpec())
    del fields["options"]
    written = dict(part.split("=", 1) for part in text.split(",") if part)
    values: dict[str, object] = {}
    for name in fields.keys() & written.keys():
        kind = float if name in ("budget", "coverage") else type(fields[name])
        values[name] = None if written[name] == "None" else kind(written[name])
    own = sorted(written.keys() - fields.keys())
    if own:
        from stem_compile.selection import policies

        options = policies.options(str(values.get("policy", fields["policy"])))
        for name in own:
            if name not in options:
                raise ValueError(f"unknown selection field {name!r}; fields: {', '.join([*fields, *options])}")
        values["options"] = tuple((name, options[name].read(written[name])) for name in own)
    return SelectionSpec(**values)  # type: ignore[arg-type]


def packed(indices: torch.Tensor, counts: torch.Tensor, width: int) -> torch.Tensor:
    """Lists [B, H, rows, any width] laid end to end, head after head: int32 [B, rows, H * width], garbage past their
    ends. counts: [B, H, rows], negative for rows without a list; those of one row sum to at most H * width."""
    batch, heads, rows, longest = indices.shape
    lane = torch.arange(longest, device=indices.device)
    place = torch.where(lane < counts.unsqueeze(-1), starts(counts).unsqueeze(-1) + lane, heads * width)
    out = indices.new_zeros(batch, rows, heads * width + 1, dtype=torch.int32)
    out.scatter_(-1, place.transpose(1, 2).flatten(2), indices.int().transpose(1, 2).flatten(2))
    return out[..., :-1].contiguous()


def unpacked(indices: torch.Tensor, counts: torch.Tensor, longest: int) -> torch.Tensor:
    """``packed``'s inverse: [B, H, rows, longest], garbage past the lists' ends."""
    lane = torch.arange(longest, device=indices.device)
    place = (starts(counts).unsqueeze(-1) + lane).clamp(max=indices.shape[-1] - 1)
    flat = indices.gather(-1, place.transpose(1, 2).flatten(2))
    return flat.view(*flat.shape[:2], counts.shape[1], longest).transpose(1, 2)


def starts(counts: torch.Tensor) -> torch.Tensor:
    """Where each head's list begins among those of its row: int64 [B, H, rows]."""
    lengths = counts.clamp(min=0)
    return lengths.cumsum(1) - lengths


@dataclass(frozen=True)
class BlockSelection:
    """indices: int32 [B, H, rows, width], ascending, garbage past ``counts``; or, where heads share budgets,
    ``packed``: [B, rows, H * width], as much memory as without sharing. counts: int32 [B, H, rows], or ``FULL``.

    block_q, block_k: tokens a query row block and a key block. key_blocks: number of key blocks.
    """

    indices: torch.Tensor
    counts: torch.Tensor
    block_q: int
    block_k: int
    key_blocks: int

    @property
    def lists(self) -> torch.Tensor:
        """int32 [B, H, rows, longest list that fits], garbage past ``counts``."""
        if self.indices.dim() == 4:
            return self.indices
        return unpacked(self.indices, self.counts, min(self.key_blocks, self.indices.shape[-1]))

    def dense(self, candidates: torch.Tensor) -> torch.Tensor:
        """Bool [B, H, rows, key_blocks]: computed pairs. candidates: bool, broadcastable to it; what ``FULL`` rows
        compute."""
        shape, lists = (*self.counts.shape, self.key_blocks), self.lists
        width = lists.shape[-1]
        listed = torch.arange(width, device=self.counts.device) < self.counts.unsqueeze(-1)
        selected = torch.zeros(*shape[:-1], self.key_blocks + 1, dtype=torch.bool, device=self.counts.device)
        selected.scatter_(-1, torch.where(listed, lists, self.key_blocks).long(), True)
        return torch.where(
            (self.counts == FULL).unsqueeze(-1), candidates.expand(shape), selected[..., : self.key_blocks]
        )

    def density(self, candidates: torch.Tensor) -> float:
        """Computed over visible block pairs, in [0, 1]."""
        visible = candidates.expand(*self.counts.shape, self.key_blocks)
        return float(self.dense(candidates).sum() / visible.sum().clamp(min=1))

    def head_densities(self, candidates: torch.Tensor) -> tuple[float, ...]:
        """``density`` of each query head."""
        computed = self.dense(candidates).sum((0, 2, 3))
        visible = candidates.expand(*self.counts.shape, self.key_blocks).sum((0, 2, 3)).clamp(min=1)
        return tuple((computed / visible).tolist())

    def check(self, candidates: torch.Tensor) -> None:
        """Raise ValueError naming the first row that is out of range, unsorted, doubled or holds a block without
        visible keys."""
        lists = self.lists
        width = lists.shape[-1]
        listed = torch.arange(width, device=self.counts.device) < self.counts.unsqueeze(-1)
        index = torch.where(listed, lists, 0)
        wrong = {
            f"count outside [0, {width}] and not FULL": (self.counts < FULL) | (self.counts > width),
            f"index outside [0, {self.key_blocks})": (listed & ((index < 0) | (index >= self.key_blocks))).any(-1),
            "indices not strictly ascending": ((index[..., 1:] <= index[..., :-1]) & listed[..., 1:]).any(-1),
        }
        for what, rows in wrong.items():
            if rows.any():
                raise ValueError(f"{what} at (batch, head, row) = {tuple(rows.nonzero()[0].tolist())}")
        visible = candidates.expand(*self.counts.shape, self.key_blocks)
        blind = (listed & ~visible.gather(-1, index.long())).any(-1)
        if blind.any():
            raise ValueError(
                f"a block without visible keys is selected at (batch, head, row) = {tuple(blind.nonzero()[0].tolist())}"
            )
