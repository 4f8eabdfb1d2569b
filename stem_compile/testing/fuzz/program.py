"""What a random program is: small frozen records, which shrink, print themselves and are written out as a script."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

SETTINGS: dict[str, Any] = {
    "block_size": 64,
    "key_block_size": 32,
    "sink_blocks": 1,
    "local_blocks": 1,
    "min_length": 1,
}
"""Options of every trial: blocks small enough that prompts of a few hundred tokens leave some out."""


class _Brief:
    """Records print what differs from their defaults, so that a shrunk one is short."""

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        shown = (f"{f.name}={getattr(self, f.name)!r}" for f in fields if getattr(self, f.name) != _default(f))
        return f"{type(self).__name__}({', '.join(shown)})"


def _default(of: dataclasses.Field[Any]) -> Any:
    return of.default_factory() if of.default_factory is not dataclasses.MISSING else of.default


@dataclass(frozen=True, repr=False)
class Attention(_Brief):
    """One attention. All but ``width`` (tokens of windows, chunks and prefixes) and ``mask_in_float`` (whether the mask
    is a bias before it reaches the scores) are keys of the tables in ``vocabulary``."""

    spelling: str = "sdpa"
    causal: str = "le"
    terms: tuple[str, ...] = ()
    join: str = "and"
    prefix: str = "none"
    width: int = 9
    mask_in_float: bool = False
    bias: str = "where"
    fill: str = "masked_fill"
    low: str = "infinity"
    scale: str = "after"
    scores: tuple[str, ...] = ()
    sink: str = "none"
    softmax: str = "method"


@dataclass(frozen=True, repr=False)
class Program(_Brief):
    """A module: its attentions over one set of queries, keys and values, and how these come in.

    key_heads and value_heads divide heads. past: tokens in a cache before the first query. layout, cache, result,
    repeat, grid: keys of ``vocabulary``. pads: "holes", "left" or "right".
    """

    attentions: tuple[Attention, ...] = (Attention(),)
    grid: str = "none"
    layout: str = "bhnd"
    result: str = "heads"
    repeat: str = "repeat_interleave"
    heads: int = 2
    key_heads: int = 2
    value_heads: int = 2
    head_dim: int = 16
    value_dim: int = 16
    batch: int = 2
    cache: str = "none"
    past: int = 0
    pads: str = "holes"
    dtype: str = "float32"


@dataclass(frozen=True, repr=False)
class Trial(_Brief):
    """A program and how it is held to account. relation: one of ``vocabulary.RELATIONS``. length: queries; again:
    queries of a second call of the same compiled module, 0 for none. budget: of every relation but "dense"."""

    program: Program = field(default_factory=Program)
    relation: str = "dense"
    length: int = 70
    again: int = 0
    budget: float = 0.5
    inner: str = "eager"
    dynamic: bool = False
    seed: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """Options of the backend."""
        return SETTINGS | {"budget": 1.0 if self.relation == "dense" else self.budget, "inner": self.inner}
