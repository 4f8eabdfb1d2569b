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

FULL = -1
"""Count of a row that computes every block of its candidates."""


@dataclass(frozen=True)
class SelectionSpec:
    """Everything a selection depends on besides tensors. Hashable; ``text()`` is its form in FX graphs and operator
    schemas.

    budget: fraction of the visible block pairs, None for the published schedule. mu, beta: Eq. 3 and Eq. 7. metric:
    "paper" (Eq. 7) or "released" (z-scored norms). pooling: "mean" (linear summaries) or "max" over anti-diagonal
    cells. stride: tokens a group.
    score_dtype: "native", or "fp8" for max pooling where the device has such matrix units.
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
        kind = float if name == "budget" else type(fields[name])
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


@dataclass(frozen=True)
class BlockSelection:
    """indices: int32 [B, H, rows, width], ascending, garbage past ``counts``. counts: int32 [B, H, rows], or ``FULL``.

    block_q, block_k: tokens a query row block and a key block. key_blocks: number of key blocks.
    """

    indices: torch.Tensor
    counts: torch.Tensor
    block_q: int
    block_k: int
    key_blocks: int

    def dense(self, candidates: torch.Tensor) -> torch.Tensor:
        """Bool [B, H, rows, key_blocks]: computed pairs. candidates: bool, broadcastable to it; what ``FULL`` rows
        compute."""
        shape = (*self.counts.shape, self.key_blocks)
        width = self.indices.shape[-1]
        listed = torch.arange(width, device=self.counts.device) < self.counts.unsqueeze(-1)
        chosen = torch.zeros(*shape[:-1], self.key_blocks + 1, dtype=torch.bool, device=self.counts.device)
        chosen.scatter_(-1, torch.where(listed, self.indices, self.key_blocks).long(), True)
        return torch.where(
            (self.counts == FULL).unsqueeze(-1), candidates.expand(shape), chosen[..., : self.key_blocks]
        )

    def density(self, candidates: torch.Tensor) -> float:
        """Computed over visible block pairs, in [0, 1]."""
        visible = candidates.expand(*self.counts.shape, self.key_blocks)
        return float(self.dense(candidates).sum() / visible.sum().clamp(min=1))

    def check(self, candidates: torch.Tensor) -> None:
        """Raise ValueError naming the first row that is out of range, unsorted, doubled or holds a block without
        visible keys."""
        width = self.indices.shape[-1]
        listed = torch.arange(width, device=self.counts.device) < self.counts.unsqueeze(-1)
        index = torch.where(listed, self.indices, 0)
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
