"""Block scores on a GPU (``oam.py``): one pass over keys and values, then a matrix product of summaries (mean pooling)
or of cells (max pooling) for each chunk of rows."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch

from stem_compile.algebra.blocks import cdiv
from stem_compile.kernels import cache
from stem_compile.kernels.spec import DTYPES, KernelSpec
from stem_compile.kernels.targets.cuda import descriptors, device, direct
from stem_compile.kernels.targets.cuda.configurations import PEAKS, RAGGED_PEAKS, cell_config, padded, pair_tile
from stem_compile.selection import Attention, parse
from stem_compile.selection.oam import positioned, value_term


@functools.lru_cache(maxsize=1024)
def _module(template: str, dtype: str, head_dim: int, value_dim: int, mask: str, spec: str) -> ModuleType:
    parsed = parse(spec)
    return cache.load(KernelSpec(template, dtype, head_dim, value_dim, parsed.block_q, parsed.block_k, mask, spec))


def module(template: str, attention: Attention) -> Any:
    """The generated module of a selection template for an attention."""
    dtype = DTYPES[attention.q.dtype]
    return _module(template, dtype, *attention.widths, attention.mask_text, attention.spec_text)


class KeySide:
    """What one pass over K and V leaves for all row chunks: summaries, presence counts, value terms.

    attention: its q, k and v with consecutive rows. before: causal offset where it is known on the host, else None.
    plain: whether scores beyond the causal edge's forced blocks need not be written. terms: ``arguments`` of the mask.
    """

    def __init__(self, attention: Attention, before: int | None, plain: bool, terms: tuple[Any, ...]) -> None:
        k, v, visible, spec = attention.k, attention.v, attention.mask.visible, attention.spec
        batch, key_heads, kv_len, head_dim = k.shape
        self.attention, self.before, self.terms = attention, before, terms
        self.columns = columns = attention.blocks[1]
        self.stride = stride = min(spec.stride, spec.block_q, spec.block_k)
        self.mean = spec.pooling == "mean"
        self.hopper = not self.mean and plain and visible is None and _on_hopper(attention)
        fp8 = self.hopper and spec.score_dtype == "fp8"
        self.scaled = _quantized(attention, k, spec.block_k, 0, columns) if fp8 else None
        self.dtype = torch.float32 if k.dtype == torch.float32 else torch.float16
        self.visible = None if visible is None else visible.contiguous().view(torch.uint8)
        self.visible_stride = kv_len if visible is not None and visible.shape[0] > 1 else 0
        size = columns if self.mean else 0
        self.sums = torch.empty(batch, key_heads, size, stride * head_dim, dtype=self.dtype, device=k.device)
        self.held = torch.empty(batch, size, stride, dtype=torch.float16, device=k.device)
        self.value = torch.empty(batch, key_heads, columns, dtype=torch.float32, device=k.device)
        released = spec.metric == "released"
        direct.launch(
            module("summaries", attention).keys,
            (columns, batch * key_heads),
            k,
            v,
            self.visible,
            self.sums,
            self.held,
            self.value,
            k.stride()[:3],
            v.stride()[:3],
            self.visible_stride,
            key_heads,
            kv_len,
            spec.beta,
            PADDED=visible is not None,
            RAW=released,
            SUMS=self.mean,
            num_warps=4,
        )
        if released:
            self.value = spec.beta * value_term(self.value, spec.metric)

    @property
    def bytes_a_row(self) -> int:
        """Memory that the scores of one row of query blocks take, with what they are made from."""
        spec, (batch, heads, _, head_dim) = self.attention.spec, self.attention.q.shape
        summary = 2 * spec.stride * head_dim if self.mean else 0
        copy = spec.block_q * self.scaled[0].shape[-1] if self.scaled is not None else 0
        return int(batch * heads * (4 * self.columns + summary + copy))

    def scores(self, start: int, chunk: int) -> torch.Tensor:
        """fp32 [B, H, chunk, columns] of the rows from ``start`` on; pairs without a visible key are left unwritten."""
        attention, q = self.attention, self.attention.q
        batch, heads, q_len, head_dim = q.shape
        scores = torch.empty(batch, heads, chunk, self.columns, dtype=torch.float32, device=q.device)
        kv_len, group = attention.k.shape[2], attention.group
        sizes = (heads, group, chunk, start, self.columns, q_len, kv_len, attention.scale, *self.terms)
        if not self.mean:
            (self._hopper_peaks if self.hopper else self._peaks)(scores, sizes)
            return scores
        sums = torch.empty(batch, heads, chunk, self.stride * head_dim, dtype=self.dtype, device=q.device)
        direct.launch(
            module("summaries", attention).queries,
            (chunk, batch * heads),
            q,
            sums,
            q.stride()[:3],
            heads,
            q_len,
            start,
            num_warps=4,
        )
        tile, inner = (128, 64) if self.dtype == torch.float16 else (64, 32)
        direct.launch(
            module("scores", attention).mean,
            (cdiv(chunk, tile) * cdiv(self.columns, tile), batch * heads),
            sums,
            self.sums,
            self.held,
            self.value,
            scores,
            *sizes,
            ROWS=tile,
            COLUMNS=tile,
            STEP=inner,
            STAGES=3,
            num_warps=8,
        )
        return scores

    def _peaks(self, scores: torch.Tensor, sizes: tuple[Any, ...]) -> None:
        """Scores by cells (max pooling)."""
        q, k, spec, stride = self.attention.q, self.attention.k, self.attention.spec, self.stride
        batch, heads, chunk, columns = scores.shape
        whole = self.visible is None and q.shape[2] % stride == 0 and k.shape[2] % stride == 0
        bulk = whole and device.capability(q.device)[0] >= 9 and _steps_are_whole(q, k)
        config = cell_config(q.element_size(), bulk)
        sides: tuple[Any, ...] = (q, k)
        if bulk:
            tiles = config["ROWS"], config["COLUMNS"]
            sides = tuple(descriptors.groups(x, stride, tile, config["STEP"]) for x, tile in zip((q, k), tiles))
        row_tiles = cdiv(chunk * (spec.block_q // stride), config["ROWS"])
        column_tiles = cdiv(columns * (spec.block_k // stride), config["COLUMNS"])
        direct.launch(
            module("cells", self.attention).peak,
            (row_tiles * column_tiles, batch * heads),
            *sides,
            self.visible,
            self.value,
            scores,
            q.stride()[:3],
            k.stride()[:3],
            self.visible_stride,
            *sizes,
            PADDED=self.visible is not None,
            **config,
        )

    def _hopper_peaks(self, scores: torch.Tensor, sizes: tuple[Any, ...]) -> None:
        """The same on Hopper: persistent programs over the tiles that hold a score which is read."""
        q, spec, stride = self.attention.q, self.attention.spec, self.stride
        (batch, heads, chunk, columns), q_len, kv_len = scores.shape, q.shape[2], self.attention.k.shape[2]
        start = sizes[3]
        ragged = bool(q_len % spec.block_q or kv_len % spec.block_k)
        config = RAGGED_PEAKS if ragged else PEAKS
        if self.scaled is not None:
            config = {**config, "STEP": 128}
        height, width = 64 * config["CONSUMERS"], config["COLUMNS"]
        row_tiles = cdiv(chunk * spec.block_q // stride, height)
        column_tiles = cdiv(columns * spec.block_k // stride, width)
        tiles = row_tiles * column_tiles
        if self.before is not None:
            local = spec.locals * spec.block_k
            ends = (min(start * spec.block_q + (r + 1) * height * stride, q_len) for r in range(row_tiles))
            tiles = sum(min(cdiv(max(end + self.before - local, 0), width * stride), column_tiles) for end in ends)
        items = tiles * batch * heads
        if not items:
            return
        sides, last, tails, scales = self._hopper_sides(start, chunk, width, config["STEP"])
        direct.launch(
            module("peaks_hopper", self.attention).peak,
            (min(items, device.multiprocessors(q.device)),),
            *sides,
            *last,
            self.value,
            *scales,
            scores,
            items,
            tiles,
            row_tiles,
            column_tiles,
            *tails,
            *sizes,
            RAGGED=ragged,
            SCALED=self.scaled is not None,
            **config,
        )

    def _hopper_sides(
        self, start: int, chunk: int, width: int, step: int
    ) -> tuple[list[Any], list[Any], list[int], tuple[torch.Tensor, torch.Tensor]]:
        """(descriptors of q and k, those of their last tiles, where the last tiles begin, scales of fp8 copies)."""
        q, k, spec, stride = self.attention.q, self.attention.k, self.attention.spec, self.stride
        tails = [1 << 30, 1 << 30]
        if self.scaled is not None:
            copy, q_scale = _quantized(self.attention, q, spec.block_q, start, chunk)
            sides = [
                descriptors.slots(copy, stride, 64, step),
                descriptors.slots(self.scaled[0], stride, width, step),
            ]
            return sides, sides, tails, (q_scale, self.scaled[1])
        sides, last = [], []
        for side, (x, tile) in enumerate(((q, 64), (k, width))):
            whole = descriptors.slots(x, stride, tile, step) if x.shape[2] >= stride else None
            tail = whole
            if x.shape[2] % stride:
                # The groups of the last tile, copied, with zeros past the end.
                tails[side] = x.shape[2] // (stride * tile) * tile
                copy = torch.nn.functional.pad(x[:, :, tails[side] * stride :], (0, 0, 0, -x.shape[2] % stride))
                tail = descriptors.slots(copy, stride, tile, step)
            sides.append(whole or tail)
            last.append(tail)
        return sides, last, tails, (self.value, self.value)


class PairScores:
    """Scores where the mask hides single pairs, so that no summary of a block serves all rows (``oam.hides_pairs``).

    attention: its q, k and v with consecutive rows. terms: ``arguments`` of the mask.
    """

    def __init__(self, attention: Attention, terms: tuple[Any, ...]) -> None:
        self.attention, self.terms = attention, terms
        self.norms = torch.linalg.vector_norm(attention.v, dim=-1, dtype=torch.float32)

    @property
    def bytes_a_row(self) -> int:
        """Memory that the scores of one row of query blocks take, with what they are made from."""
        batch, heads = self.attention.shape[:2]
        return batch * heads * 8 * self.attention.blocks[1]

    def scores(self, start: int, chunk: int) -> torch.Tensor:
        """fp32 [B, H, chunk, columns] of the rows from ``start`` on; pairs without a visible key hold garbage."""
        attention, q, k, spec = self.attention, self.attention.q, self.attention.k, self.attention.spec
        (batch, heads, q_len, kv_len), columns = attention.shape, attention.blocks[1]
        stride = min(spec.stride, spec.block_q, spec.block_k)
        pooled = torch.empty(batch, heads, chunk, columns, dtype=torch.float32, device=q.device)
        # Tiles beyond the mask's edges are left unwritten, and "released" reads all of a row.
        largest = torch.zeros_like(pooled)
        tile = pair_tile(q.element_size() * padded(q.shape[-1]))
        row_tiles, column_tiles = (
            cdiv(blocks * (size // stride), tile) for blocks, size in ((chunk, spec.block_q), (columns, spec.block_k))
        )
        direct.launch(
            module("pairs", attention).pool,
            (row_tiles * column_tiles, batch * heads),
            q,
            k,
            self.norms,
            pooled,
            largest,
            q.stride()[:3],
            k.stride()[:3],
            heads,
            attention.group,
            chunk,
            start,
            columns,
            q_len,
            kv_len,
            attention.scale,
            *self.terms,
            ROWS=tile,
            COLUMNS=tile,
            PEAK=spec.pooling == "max",
            num_warps=8,
        )
        scores = positioned(attention, pooled, slice(start, start + chunk))
        return scores + spec.beta * value_term(largest, spec.metric)


def _steps_are_whole(*tensors: torch.Tensor) -> bool:
    """Whether TMA can address 16-bit tensors by groups of tokens."""
    return all(
        x.element_size() == 2 and x.data_ptr() % 16 == 0 and all(step % 8 == 0 and step > 0 for step in x.stride()[:3])
        for x in tensors
    )


def _on_hopper(attention: Attention) -> bool:
    """Whether the Hopper template scores cells: 16-bit tensors that TMA can address."""
    q, k = attention.q, attention.k
    return q.shape[-1] % 8 == 0 and device.capability(q.device)[0] == 9 and _steps_are_whole(q, k)


def _quantized(
    attention: Attention, x: torch.Tensor, block: int, first: int, blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 copy [B, H, blocks * block, d to a multiple of 16] of the blocks from ``first`` on, zeros past the end;
    fp32 scales [B, H, blocks]) of x, which is q or k."""
    batch, heads, length, head_dim = x.shape
    width = cdiv(head_dim, 16) * 16
    copy = torch.empty(batch, heads, blocks * block, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(batch, heads, blocks, dtype=torch.float32, device=x.device)
    direct.launch(
        module("quantize", attention).quantize,
        (blocks, batch * heads),
        x,
        copy,
        scale,
        x.stride()[:3],
        heads,
        length,
        first,
        BLOCK=block,
        WIDTH=width,
        num_warps=8,
    )
    return copy, scale
