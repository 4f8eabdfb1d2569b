"""Block scores by pooled mass on a GPU (``mass.py``): means of queries and keys in one pass, then one kernel a chunk of
rows."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from stem_compile.algebra.blocks import cdiv, split
from stem_compile.algebra.masks import And, Causal, Full, decode, encode
from stem_compile.kernels import cache
from stem_compile.kernels.spec import DTYPES, KernelSpec
from stem_compile.kernels.targets.cuda import descriptors, device
from stem_compile.kernels.targets.cuda.block_scores import module
from stem_compile.kernels.triton.arguments import arguments
from stem_compile.selection import Attention, parse
from stem_compile.selection.mass import grouped, row_values
from stem_compile.selection.oam import hides_pairs, value_term

LOG2E = 1.4426950408889634
TILE = 64, 128
"""Query groups a program and key groups a tile of the portable kernel."""
HOPPER: dict[str, Any] = {"COLUMNS": 128, "STAGES": 4, "POLYNOMIAL": 0, "num_warps": 4}
"""Launch configuration of the Hopper kernel."""
HOPPER_ROWS, HOPPER_HALVES = 64, 4
"""Query groups of one product of the Hopper kernel, and products that a program has under way."""


@functools.lru_cache(maxsize=1024)
def _pair_terms(mask: str) -> str:
    """Text of the terms that are not about keys alone."""
    parts = split(decode(mask))
    kept = [*([] if parts.causal is None else [Causal(parts.causal)]), *parts.bands, *parts.others]
    return encode(Full() if not kept else kept[0] if len(kept) == 1 else And(tuple(kept)))


@functools.lru_cache(maxsize=1024)
def _module(template: str, dtype: str, head_dim: int, value_dim: int, mask: str, spec: str, score: str) -> ModuleType:
    parsed = parse(spec)
    key = KernelSpec(template, dtype, head_dim, value_dim, parsed.block_q, parsed.block_k, mask, spec, score)
    return cache.load(key)


class Means:
    """Means of an attention's query and key groups, made at once, and the block scores that they give. attention: its
    q, k and v with consecutive rows."""

    def __init__(self, attention: Attention) -> None:
        if attention.scale <= 0:  # the kernels take a row's maximum before they scale
            attention = _with_positive_scale(attention)
        self.attention, spec, q, k, v = attention, attention.spec, attention.q, attention.k, attention.v
        (batch, heads, q_len, head_dim), (key_heads, kv_len) = q.shape, k.shape[1:3]
        (size_q, size_k), (rows, columns) = spec.group_sizes, attention.blocks
        self.across, self.along = spec.block_q // size_q, spec.block_k // size_k
        dtype = torch.float32 if q.dtype == torch.float32 else torch.float16
        make = functools.partial(torch.empty, device=q.device)
        self.queries = make(batch, heads, rows * self.across, head_dim, dtype=dtype)
        self.keys = make(batch, key_heads, columns * self.along, head_dim, dtype=dtype)
        self.value = make(batch, key_heads, columns, dtype=torch.float32)
        visible = attention.mask.visible
        self.padded = visible is not None
        self.count = make(batch, columns * self.along, dtype=torch.float32) if self.padded else self.value
        self.present = self.value if visible is None else visible.contiguous().view(torch.uint8)
        self.present_stride = kv_len if visible is not None and len(visible) > 1 else 0
        self.last = self._last_visible()
        # Value terms of blocks, or of blocks as each row sees them.
        self.by_row = hides_pairs(attention)
        released = spec.metric == "released" and not self.by_row
        pool: Any = module("means", attention)
        pool.means[(max(rows, columns), batch * (heads + key_heads))](
            q, k, v, self.present, self.queries, self.keys, self.count, self.value,
            q.stride()[:3], k.stride()[:3], v.stride()[:3], self.present_stride, heads, key_heads,
            rows, columns, q_len, kv_len, 0.0 if self.by_row else spec.beta,
            PADDED=self.padded, RAW=released, num_warps=4,
        )  # fmt: skip
        if released:
            self.value = spec.beta * value_term(self.value, spec.metric)
        self.hopper = dtype == torch.float16 and self._on_hopper()
        pairs = _pair_terms(attention.mask_text)
        self.runtime = arguments(attention.tensors, attention.scalars, pairs, attention.score_text, q.device)
        self.kernel: Any = _module(
            "mass_hopper" if self.hopper else "mass", DTYPES[q.dtype], head_dim, v.shape[-1], pairs,
            attention.spec_text, attention.score_text,
        )  # fmt: skip

    @property
    def bytes_a_row(self) -> int:
        """Scores of one row of query blocks."""
        return 4 * self.queries.shape[0] * self.queries.shape[1] * self.attention.blocks[1]

    def _last_visible(self) -> torch.Tensor:
        """int32 [B, key groups]: where a position-dependent score reads each group, under padding."""
        spec, visible = self.attention.spec, self.attention.mask.visible
        if visible is None or not self.attention.score.positional:
            return self.value
        found = grouped(visible[:, None, :, None].float(), visible, spec.group_sizes[1], spec.block_k, torch.float32)
        return found.last.int().expand(self.queries.shape[0], -1).contiguous()

    def _on_hopper(self) -> bool:
        """Whether the Hopper template scores: causal order alone, heads and blocks that its tiles take."""
        parts, head_dim = self.attention.mask.parts, self.queries.shape[-1]
        plain = not (parts.keys or parts.bands or parts.others or self.attention.score.modified)
        whole = head_dim % 8 == 0 and head_dim <= 128 and self.across <= HOPPER_ROWS and 4 <= self.along <= 32
        return plain and whole and device.capability(self.queries.device)[0] == 9

    def scores(self, start: int, chunk: int) -> torch.Tensor:
        """fp32 [B, H, chunk, columns] of the rows from ``start`` on; pairs beyond the mask's edges are left
        unwritten."""
        columns = self.attention.blocks[1]
        scores = self.value.new_empty(*self.queries.shape[:2], chunk, columns)
        (self._hopper_scores if self.hopper else self._portable_scores)(scores, start)
        if self.by_row:
            scores += row_values(self.attention, slice(start, start + chunk)) * self.attention.spec.beta
        return scores

    def _sizes(self, scores: torch.Tensor, start: int) -> tuple[Any, ...]:
        """Heads, heads a key head, rows of the chunk, its first."""
        return scores.shape[1], self.attention.group, scores.shape[2], start

    def _hopper_scores(self, scores: torch.Tensor, start: int) -> None:
        width = HOPPER["COLUMNS"]
        batch, heads, chunk, columns = scores.shape
        tiles = cdiv(columns * self.along, width)
        row_tiles = cdiv(chunk * self.across, HOPPER_ROWS * HOPPER_HALVES)
        items = row_tiles * batch * heads
        programs = min(items, device.multiprocessors(scores.device))
        peaks = scores.new_empty(programs, HOPPER_HALVES, tiles, HOPPER_ROWS)
        sums = scores.new_empty(*peaks.shape, width // self.along)
        self.kernel.mass[(programs,)](
            descriptors.boxes(self.queries, HOPPER_ROWS), descriptors.boxes(self.keys, width), self.value, sums, peaks,
            scores, items, row_tiles, tiles, *self._sizes(scores, start), columns, *self.attention.shape[2:],
            self.attention.scale * LOG2E, *self.runtime, **HOPPER,
        )  # fmt: skip

    def _portable_scores(self, scores: torch.Tensor, start: int) -> None:
        parts, modified = self.attention.mask.parts, self.attention.score.modified
        batch, heads, chunk, columns = scores.shape
        height, width = max(TILE[0], self.across), max(TILE[1], self.along)
        tiles = cdiv(columns * self.along, width)
        items = cdiv(chunk * self.across, height) * batch * heads
        programs = min(items, 2 * device.multiprocessors(scores.device))
        scratch = scores.new_empty(programs, tiles, height, width // self.along)
        # Whether a query sees an interval of keys, or every key has to be looked at.
        pairs = 2 if parts.others or (parts.bands and self.padded) else 1 if parts.bands else 0
        self.kernel.mass[(programs,)](
            self.queries, self.keys, self.present, self.count, self.last, self.value, scratch, scores,
            self.present_stride, self.count.shape[-1] if self.padded and batch > 1 else 0,
            items, tiles, *self._sizes(scores, start), self.attention.blocks[0], columns, *self.attention.shape[2:],
            self.attention.scale * (1.0 if modified else LOG2E), *self.runtime,
            ROWS=height, COLUMNS=width, STAGES=3, PADDED=self.padded, PAIRS=pairs, num_warps=4,
        )  # fmt: skip


def _with_positive_scale(attention: Attention) -> Attention:
    if attention.scale == 0:
        return replace(attention, q=torch.zeros_like(attention.q), scale=1.0)
    return replace(attention, q=-attention.q, scale=-attention.scale)
