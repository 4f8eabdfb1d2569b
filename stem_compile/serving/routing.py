"""What a serving engine's step is made of: which queries are prefilled sparsely, which stay with the engine's own
attention and why, and the count of both. Knows no engine."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from stem_compile.config import StemConfig
from stem_compile.reasons import Reason


@dataclass(frozen=True)
class Part:
    """What one step computes of one request, in tokens.

    row: place of the request in the batch. start: its first query among the packed ones. queries: how many there are;
    they are the last of the ``keys`` tokens that the request has so far. prompt: tokens of its whole prompt.
    """

    row: int
    start: int
    queries: int
    keys: int
    prompt: int

    def __post_init__(self) -> None:
        if self.row < 0 or self.start < 0 or self.queries < 0 or self.prompt < 0 or self.keys < self.queries:
            raise ValueError(
                f"{self}: no number may be negative, and {self.queries} queries need at least as many keys; the"
                " engine's lengths and this step do not belong together"
            )

    @property
    def begin(self) -> int:
        """Position of the first query in its request."""
        return self.keys - self.queries

    @property
    def total(self) -> int:
        """Tokens that are prefilled in all: a request that was preempted prefills what it had generated too."""
        return max(self.prompt, self.keys)

    @property
    def prefills(self) -> bool:
        """Whether it computes tokens of the prompt."""
        return self.queries > 0 and self.begin < self.prompt


@dataclass(frozen=True)
class Piece:
    """Queries of a part that are computed one way. start, queries, keys: as in ``Part``, which ``part`` is."""

    part: Part
    start: int
    queries: int
    keys: int
    sparse: bool


def reason(part: Part, config: StemConfig) -> Reason | None:
    """Why a part stays with the engine as a whole; None where at least a block of its queries selects."""
    if not part.prefills:
        return Reason.DECODE
    if part.total < max(config.shortest, 2):
        return Reason.SHORT
    first, last = _aligned(part, config.block_size)
    return None if last > first else Reason.CHUNK


def pieces(part: Part, config: StemConfig) -> Iterator[Piece]:
    """The part, cut where a chunk cuts a block of queries in two: half a block does not select what the whole one
    does, so such blocks stay dense, and all others select as one shot would. Pieces of no query are left out."""
    if reason(part, config) is not None:
        yield Piece(part, part.start, part.queries, part.keys, False)
        return
    edges = part.begin, *_aligned(part, config.block_size), part.keys
    for number, (first, last) in enumerate(itertools.pairwise(edges)):
        if last > first:
            yield Piece(part, part.start + first - part.begin, last - first, last, number == 1)


def _aligned(part: Part, block: int) -> tuple[int, int]:
    """Positions between which blocks of queries are whole; the prompt's last block is, however short."""
    first = min(-(-part.begin // block) * block, part.keys)
    last = part.keys if part.keys >= part.total else part.keys // block * block
    return first, max(first, last)


@dataclass
class Metrics:
    """Prefills of a process so far. A chunk of a prompt is one; every token of a prompt that a step computes is counted
    once, under ``sparse`` or under the reason for which it is native.

    prompts: prompts prefilled to their end. chunks, tokens: by outcome, "sparse" or the name of a ``Reason``; tokens of
    the blocks that a chunk cuts in two count under ``Reason.CHUNK``. decodes: steps of requests that computed no token
    of a prompt. computed, visible: pairs of blocks of the attentions that were measured, one layer's a step.
    """

    prompts: int = 0
    chunks: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    decodes: int = 0
    computed: int = 0
    visible: int = 0
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    def count(self, part: Part, config: StemConfig, why: Reason | None) -> None:
        """Take a part into the count. why: the reason for which it is native as a whole."""
        with self._lock:
            if not part.prefills:
                self.decodes += part.queries > 0
                return
            self.prompts += part.keys >= part.prompt
            self.chunks["sparse" if why is None else why.name] += 1
            if why is not None:
                self.tokens[why.name] += part.queries
                return
            for piece in pieces(part, config):
                self.tokens["sparse" if piece.sparse else Reason.CHUNK.name] += piece.queries

    def recount(self, parts: Sequence[Part], config: StemConfig, why: Reason) -> None:
        """Parts that were counted as sparse were answered by the engine after all."""
        with self._lock:
            for part in parts:
                self.chunks["sparse"] -= 1
                self.chunks[why.name] += 1
                for piece in pieces(part, config):
                    self.tokens["sparse" if piece.sparse else Reason.CHUNK.name] -= piece.queries
                self.tokens[why.name] += part.queries

    def measure(self, computed: int, visible: int) -> None:
        """Take a selection into the density: pairs of blocks computed and visible."""
        with self._lock:
            self.computed += computed
            self.visible += visible

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers: prompts, chunks, tokens (by outcome), decodes, density (None before any was measured)."""
        with self._lock:
            return {
                "prompts": self.prompts,
                "chunks": {k: n for k, n in sorted(self.chunks.items()) if n},
                "tokens": {k: n for k, n in sorted(self.tokens.items()) if n},
                "decodes": self.decodes,
                "density": self.computed / self.visible if self.visible else None,
            }

    def clear(self) -> None:
        """Begin at zero."""
        with self._lock:
            self.prompts = self.decodes = self.computed = self.visible = 0
            self.chunks.clear()
            self.tokens.clear()
