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
from stem_compile.kernels.targets.cuda import descriptors, device, direct
from stem_compile.kernels.targets.cuda.block_scores import module
from stem_compile.kernels.triton.arguments import arguments
from stem_compile.selection import Attention, parse
from stem_compile.selection.mass import grouped, row_values
from stem_compile.selection.oam import hides_pairs, value_term

LOG2E = 1.4426950408889634
PITCH = 16
"""Scores of a row begin at a multiple of it, so that kernels read and write four at a time."""
TILE = 64, 128
"""Query groups a program and key groups a tile of the portable kernel."""
HOPPER: dict[str, Any] = {"STAGES": 4, "REGISTERS": 200, "num_warps": 4}
"""Launch configuration of the Hopper kernel."""
HOPPER_ROWS, HOPPER_HALVES, HOPPER_COLUMNS = 64, 4, 128
"""Query groups of one product of the Hopper kernel, products that a program has under way, key groups a tile."""


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
        self.attention, spec, q = attention, attention.spec, attention.q
        size_q, size_k = spec.group_sizes
        self.across, self.along = spec.block_q // size_q, spec.block_k // size_k
        self.dtype = torch.float32 if q.dtype == torch.float32 else torch.float16
        self.hopper = self.dtype == torch.float16 and self._on_hopper()
        visible = attention.mask.visible
        self.padded = visible is not None
        self.value: torch.Tensor
        # Value terms of blocks, or of blocks as each row sees them.
        self.by_row = hides_pairs(attention)
        self._pool(visible)
        if spec.metric == "released" and not self.by_row:
            self.value = spec.beta * value_term(self.value, spec.metric)
        pairs = _pair_terms(attention.mask_text)
        self.runtime = arguments(attention.tensors, attention.scalars, pairs, attention.score_text, q.device)
        self.kernel: Any = _module(
            "mass_hopper" if self.hopper else "mass", DTYPES[q.dtype], *attention.widths, pairs,
            attention.spec_text, attention.score_text,
        )  # fmt: skip

    def _pool(self, visible: torch.Tensor | None) -> None:
        """Means of keys, value terms and, but on Hopper, means of queries."""
        attention, spec = self.attention, self.attention.spec
        q, k, v, (rows, columns) = attention.q, attention.k, attention.v, attention.blocks
        (batch, heads, q_len, head_dim), (key_heads, kv_len) = q.shape, k.shape[1:3]
        make = functools.partial(torch.empty, device=q.device)
        groups = columns * self.along
        if self.hopper:  # whole tiles; the kernel averages queries itself
            groups, rows, heads = cdiv(groups, HOPPER_COLUMNS) * HOPPER_COLUMNS, 0, 0
            if spec.score_dtype == "fp8" and head_dim % 16 == 0 and head_dim >= 32:
                self.dtype = torch.float8_e4m3fn
        self.keys = make(batch, key_heads, groups, head_dim, dtype=self.dtype)
        self.queries = make(batch, heads, rows * self.across, head_dim, dtype=self.dtype)
        self.value = make(batch, key_heads, columns, dtype=torch.float32)
        self.norms = torch.empty_like(self.value) if self.hopper else self.value
        self.unit = make(batch, key_heads, dtype=torch.float32) if self.hopper else self.value
        self.count = make(batch, columns * self.along, dtype=torch.float32) if self.padded else self.value
        self.present = self.value if visible is None else visible.contiguous().view(torch.uint8)
        self.present_stride = kv_len if visible is not None and len(visible) > 1 else 0
        self.last = self._last_visible()
        # The Hopper kernel's scores are exponents of 2 as they come out of the product, but for an extreme scale.
        factor = attention.scale * LOG2E
        k_factor = min(max(factor, 1.0), 16.0) if self.hopper else 1.0
        self.factors = min(factor, 1.0), max(factor / 16.0, 1.0)
        pool: Any = module("means", attention)
        direct.launch(
            pool.means, (max(rows, columns), batch * (heads + key_heads)),
            q, k, v, self.present, self.queries, self.keys, self.count, self.value, self.norms, self.unit,
            q.stride()[:3], k.stride()[:3], v.stride()[:3], self.present_stride, heads, key_heads,
            rows, columns, q_len, kv_len, 0.0 if self.by_row else spec.beta, groups, k_factor,
            PADDED=self.padded, RAW=spec.metric == "released" and not self.by_row,
            TILED=self.hopper, CENTRED=attention.score.sink is None, num_warps=4,
        )  # fmt: skip

    @property
    def bytes_a_row(self) -> int:
        """Scores of one row of query blocks."""
        batch, heads = self.attention.shape[:2]
        return 4 * batch * heads * self.attention.blocks[1]

    def _last_visible(self) -> torch.Tensor:
        """int32 [B, key groups]: where a position-dependent score reads each group, under padding."""
        spec, visible = self.attention.spec, self.attention.mask.visible
        if visible is None or not self.attention.score.positional:
            return self.value
        groups = grouped(visible[:, None, :, None].float(), visible, spec.group_sizes[1], spec.block_k, torch.float32)
        return groups.last.int().expand(self.attention.shape[0], -1).contiguous()

    def _on_hopper(self) -> bool:
        """Whether the Hopper template scores: causal order alone, heads and blocks that its tiles take."""
        parts, head_dim = self.attention.mask.parts, self.attention.q.shape[-1]
        plain = not (parts.keys or parts.bands or parts.others or self.attention.score.modified)
        whole = head_dim % 8 == 0 and head_dim <= 128 and self.across <= HOPPER_ROWS and 4 <= self.along <= 32
        return plain and whole and device.capability(self.attention.device)[0] == 9

    def scores(self, start: int, chunk: int) -> torch.Tensor:
        """fp32 [B, H, chunk, columns] of the rows from ``start`` on, each at a multiple of PITCH; pairs beyond the
        mask's edges are left unwritten."""
        columns = self.attention.blocks[1]
        scores = self.value.new_empty(*self.attention.shape[:2], chunk, cdiv(columns, PITCH) * PITCH)[..., :columns]
        (self._hopper_scores if self.hopper else self._portable_scores)(scores, start)
        if self.by_row:
            scores += row_values(self.attention, slice(start, start + chunk)) * self.attention.spec.beta
        return scores

    def _sizes(self, scores: torch.Tensor, start: int) -> tuple[Any, ...]:
        """Heads, heads a key head, rows of the chunk, its first."""
        return scores.shape[1], self.attention.group, scores.shape[2], start

    def _hopper_scores(self, scores: torch.Tensor, start: int) -> None:
        attention, (batch, heads, chunk, columns) = self.attention, scores.shape
        q, tiles = attention.q, self.keys.shape[2] // HOPPER_COLUMNS
        row_tiles = cdiv(chunk * self.across, HOPPER_ROWS * HOPPER_HALVES)
        items = row_tiles * batch * heads
        programs = min(items, device.multiprocessors(scores.device))
        # What a program keeps of an item while it is at the next.
        means = self.keys.new_empty(1, programs * 2, HOPPER_HALVES * HOPPER_ROWS, q.shape[-1])
        wide = scores.new_empty(programs * 2, dtype=torch.int32)
        weights = scores.new_empty(programs * 2, HOPPER_HALVES, HOPPER_ROWS)
        sums = scores.new_empty(*weights.shape, tiles * (HOPPER_COLUMNS // self.along), dtype=torch.bfloat16)
        direct.launch(
            self.kernel.mass, (programs,),
            q, q.stride()[:3], descriptors.boxes(means, HOPPER_ROWS), descriptors.boxes(self.keys, HOPPER_COLUMNS),
            means, self.norms, self.unit, self.value, wide, sums, weights, scores, items, row_tiles, tiles,
            *self._sizes(scores, start), columns, scores.stride(2), *attention.shape[2:], *self.factors,
            *self.runtime, **HOPPER,
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
        direct.launch(
            self.kernel.mass, (programs,),
            self.queries, self.keys, self.present, self.count, self.last, self.value, scratch, scores,
            self.present_stride, self.count.shape[-1] if self.padded and batch > 1 else 0,
            items, tiles, *self._sizes(scores, start), self.attention.blocks[0], columns, scores.stride(2),
            *self.attention.shape[2:],
            self.attention.scale * (1.0 if modified else LOG2E), *self.runtime,
            ROWS=height, COLUMNS=width, STAGES=3, PADDED=self.padded, PAIRS=pairs, num_warps=4,
        )  # fmt: skip


def _with_positive_scale(attention: Attention) -> Attention:
    if attention.scale == 0:
        return replace(attention, q=torch.zeros_like(attention.q), scale=1.0)
    return replace(attention, q=-attention.q, scale=-attention.scale)
