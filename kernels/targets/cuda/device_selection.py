"""Block selection on a GPU: summaries, scores and lists, in row chunks so that scores stay small at any length."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import sympy
import torch

from stem_compile import ops, selection
from stem_compile.algebra.blocks import candidates, causal_offset, cdiv, first_visible, key_visible, split, unbanded
from stem_compile.algebra.masks import decode
from stem_compile.kernels import cache
from stem_compile.kernels.spec import DTYPES, KernelSpec
from stem_compile.kernels.targets.cuda import device
from stem_compile.kernels.triton.arguments import arguments
from stem_compile.selection import FULL, SelectionSpec
from stem_compile.selection.tpd import everything, full_rows, row_limits

SCORE_BYTES = 1 << 28
"""Largest score buffer; longer prompts are scored in row chunks of it."""
CHUNK_UNIT = 128
"""Rows of a chunk come in multiples of it: whole tiles of the score kernels."""


@functools.lru_cache(maxsize=1024)
def _module(template: str, dtype: str, head_dim: int, value_dim: int, mask: str, spec: str) -> ModuleType:
    chosen = selection.parse(spec)
    return cache.load(KernelSpec(template, dtype, head_dim, value_dim, chosen.block_q, chosen.block_k, mask, spec))


@functools.lru_cache(maxsize=1024)
def _terms(mask: str) -> tuple[bool, bool]:
    """(some keys are hidden from every query, some term is neither an edge nor about keys alone)."""
    parts = split(decode(mask))
    return bool(parts.keys), bool(parts.others)


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    scalars: Sequence[int],
    mask: str,
    scale: float,
    spec: str,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """stem::select: (indices int32 [B, H, rows, width], counts int32 [B, H, rows])."""
    chosen = selection.parse(spec)
    batch, heads, q_len, head_dim = q.shape
    kv_len = k.shape[2]
    shape = (batch, heads, q_len, kv_len)
    rows, columns = cdiv(q_len, chosen.block_q), cdiv(kv_len, chosen.block_k)
    *index_shape, width = ops.selection_shape(q, k, chosen)
    indices = torch.empty(*index_shape, width, dtype=torch.int32, device=q.device)
    counts = torch.empty(index_shape, dtype=torch.int32, device=q.device)
    if not counts.numel():
        return indices, counts
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    scored = not everything(chosen)
    padded, explicit = _terms(mask)
    visible = possible = None
    first, first_stride = counts, 0
    limits = counts
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if padded:
        visible = key_visible(decode(mask), shape, tensors, scalars, q.device)
        assert visible is not None
        first = first_visible(visible, kv_len, chosen.block_k, q.device)
        first_stride = first.stride(0) if first.shape[0] > 1 else 0
    if explicit:
        possible = candidates(decode(mask), shape, tensors, scalars, chosen.block_q, chosen.block_k, q.device)
        limits = _limits(possible, mask, shape, tensors, scalars, chosen).expand(batch, heads, rows)
        possible = possible.expand(batch, heads, rows, columns).view(torch.uint8)
        strides = possible.stride()
    terms = arguments(tensors, scalars, mask, device=q.device)
    module = functools.partial(
        _module, dtype=DTYPES[q.dtype], head_dim=head_dim, value_dim=v.shape[-1], mask=mask, spec=spec
    )
    # Where the forced blocks are not simply the last before the diagonal, or that is known on the device only, every
    # score is written.
    plain = not explicit and not _reads_offset(mask)
    before = causal_offset(decode(mask), shape, (), scalars) if plain else None
    keys = _KeySide(q, k, v, visible, before, plain, chosen, module) if scored else None
    nb = 1 << (columns - 1).bit_length() if columns > 1 else 2
    bytes_a_row = batch * heads * (4 * columns + (2 * chosen.stride * head_dim if chosen.pooling == "mean" else 0))
    if keys is not None and keys.scaled is not None:
        bytes_a_row += batch * heads * chosen.block_q * keys.scaled[0].shape[-1]
    step = min(rows, max(1, SCORE_BYTES // bytes_a_row // CHUNK_UNIT) * CHUNK_UNIT) if scored else rows
    for start in range(0, rows, step):
        chunk = min(step, rows - start)
        scores = counts if keys is None else keys.scores(q, start, chunk, columns, scale, terms, chosen, module)
        module("select").select[(chunk, batch * heads)](
            scores,
            first,
            counts if possible is None else possible,
            limits,
            indices,
            counts,
            first_stride,
            strides,
            limits.stride(),
            heads,
            start,
            rows,
            columns,
            width,
            q_len,
            kv_len,
            *terms,
            NB=nb,
            SCORED=scored,
            PADDED=padded,
            EXPLICIT=explicit,
            num_warps=max(1, min(16, nb // 1024)),
        )
    return indices, counts


@functools.lru_cache(maxsize=1024)
def _reads_offset(mask: str) -> bool:
    """Whether the causal offset is a tensor's value."""
    causal = split(decode(mask)).causal
    return causal is not None and bool(sympy.sympify(causal.offset).atoms(sympy.core.function.AppliedUndef))


def _limits(
    possible: torch.Tensor,
    mask: str,
    shape: tuple[int, int, int, int],
    tensors: Sequence[torch.Tensor],
    scalars: Sequence[int],
    chosen: SelectionSpec,
) -> torch.Tensor:
    """int32 [B or 1, H or 1, rows]: length of each row's list, ``FULL`` for full rows."""
    visible = possible.sum(-1)
    reach = None
    if split(decode(mask)).bands:
        reach = candidates(
            unbanded(decode(mask)), shape, tensors, scalars, chosen.block_q, chosen.block_k, possible.device
        ).sum(-1)
    limit = row_limits(visible, chosen, reach)
    return torch.where(full_rows(visible, limit, chosen, reach), FULL, limit).int()


class _KeySide:
    """What one pass over K and V leaves for all row chunks: summaries, presence counts, value terms."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        visible: torch.Tensor | None,
        before: int | None,
        plain: bool,
        chosen: SelectionSpec,
        module: Any,
    ) -> None:
        batch, key_heads, kv_len, head_dim = k.shape
        columns = cdiv(kv_len, chosen.block_k)
        stride = min(chosen.stride, chosen.block_q, chosen.block_k)
        self.k, self.stride, self.kv_len, self.before = k, stride, kv_len, before
        self.mean = chosen.pooling == "mean"
        self.hopper = not self.mean and plain and peaks_on_hopper(q, k, visible)
        self.scaled = (
            _quantized(k, chosen.block_k, 0, columns, module) if self.hopper and chosen.score_dtype == "fp8" else None
        )
        self.dtype = torch.float32 if k.dtype == torch.float32 else torch.float16
        self.visible = None if visible is None else visible.contiguous().view(torch.uint8)
        self.visible_stride = kv_len if visible is not None and visible.shape[0] > 1 else 0
        size = columns if self.mean else 0
        self.sums = torch.empty(batch, key_heads, size, stride * head_dim, dtype=self.dtype, device=k.device)
        self.held = torch.empty(batch, size, stride, dtype=torch.float16, device=k.device)
        self.value = torch.empty(batch, key_heads, columns, dtype=torch.float32, device=k.device)
        released = chosen.metric == "released"
        module("summaries").keys[(columns, batch * key_heads)](
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
            chosen.beta,
            PADDED=visible is not None,
            RAW=released,
            SUMS=self.mean,
            num_warps=4,
        )
        if released:
            self.value = chosen.beta * _released(self.value)

    def scores(self, q, start, chunk, columns, scale, terms, chosen, module) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """fp32 [B, H, chunk, columns]; block pairs without a visible key are left unwritten. terms: ``arguments`` of
        the mask."""
        batch, heads, q_len, head_dim = q.shape
        group = heads // self.k.shape[1]
        scores = torch.empty(batch, heads, chunk, columns, dtype=torch.float32, device=q.device)
        sizes = (heads, group, chunk, start, columns, q_len, self.kv_len, scale, *terms)
        if self.mean:
            sums = torch.empty(batch, heads, chunk, self.stride * head_dim, dtype=self.dtype, device=q.device)
            module("summaries").queries[(chunk, batch * heads)](
                q, sums, q.stride()[:3], heads, q_len, start, num_warps=4
            )
            tile, inner = (128, 64) if self.dtype == torch.float16 else (64, 32)
            module("scores").mean[(cdiv(chunk, tile) * cdiv(columns, tile), batch * heads)](
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
        else:
            self._peaks(q, scores, sizes, chosen, module)
        return scores

    def _peaks(
        self, q: torch.Tensor, scores: torch.Tensor, sizes: tuple[Any, ...], chosen: SelectionSpec, module: Any
    ) -> None:
        """Scores by cells (max pooling)."""
        chunk, columns = scores.shape[2:]
        cells_q, cells_k = chosen.block_q // self.stride, chosen.block_k // self.stride
        if self.hopper:
            self._hopper_peaks(q, scores, sizes, chosen, module)
            return
        config = cell_config(q, self.k, self.visible, self.stride)
        sides = (q, self.k)
        if config["BULK"]:
            sides = (
                _groups(q, self.stride, config["ROWS"], config["STEP"]),
                _groups(self.k, self.stride, config["COLUMNS"], config["STEP"]),
            )
        module("cells").peak[
            (
                cdiv(chunk * cells_q, config["ROWS"]) * cdiv(columns * cells_k, config["COLUMNS"]),
                scores.shape[0] * scores.shape[1],
            )
        ](
            *sides,
            self.visible,
            self.value,
            scores,
            q.stride()[:3],
            self.k.stride()[:3],
            self.visible_stride,
            *sizes,
            PADDED=self.visible is not None,
            **config,
        )

    def _hopper_peaks(
        self, q: torch.Tensor, scores: torch.Tensor, sizes: tuple[Any, ...], chosen: SelectionSpec, module: Any
    ) -> None:
        """The same on Hopper: persistent programs over the tiles that hold a score which is read."""
        stride = self.stride
        (batch, heads, chunk, columns), q_len, kv_len = scores.shape, q.shape[2], self.kv_len
        start = sizes[3]
        ragged = bool(q_len % chosen.block_q or kv_len % chosen.block_k)
        config = RAGGED_PEAKS if ragged else PEAKS
        scaled = self.scaled is not None
        if scaled:
            config = {**config, "STEP": 128}
        height, width = 64 * config["CONSUMERS"], config["COLUMNS"]
        row_tiles, column_tiles = (
            cdiv(chunk * chosen.block_q // stride, height),
            cdiv(columns * chosen.block_k // stride, width),
        )
        tiles = row_tiles * column_tiles
        if self.before is not None:
            local = chosen.locals * chosen.block_k
            seen = [
                min(start * chosen.block_q + (r + 1) * height * stride, q_len) + self.before - local
                for r in range(row_tiles)
            ]
            tiles = sum(min(cdiv(max(s, 0), width * stride), column_tiles) for s in seen)
        items = tiles * batch * heads
        if not items:
            return
        sides, last, tails = [], [], [1 << 30, 1 << 30]
        scales = (self.value, self.value)
        if self.scaled is not None:
            copy, q_scale = _quantized(q, chosen.block_q, start, chunk, module)
            sides = last = [
                _slots(copy, stride, 64, config["STEP"]),
                _slots(self.scaled[0], stride, width, config["STEP"]),
            ]
            scales = (q_scale, self.scaled[1])
        else:
            for side, (x, tile) in enumerate(((q, 64), (self.k, width))):
                described = _slots(x, stride, tile, config["STEP"]) if x.shape[2] >= stride else None
                if x.shape[2] % stride:
                    # The groups of the last tile, copied, with zeros past the end.
                    tails[side] = x.shape[2] // (stride * tile) * tile
                    copy = torch.nn.functional.pad(x[:, :, tails[side] * stride :], (0, 0, 0, -x.shape[2] % stride))
                    last.append(_slots(copy, stride, tile, config["STEP"]))
                sides.append(described or last[side])
                last += [described] * (side + 1 - len(last))
        module("peaks_hopper").peak[(min(items, device.multiprocessors(q.device)),)](
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
            SCALED=scaled,
            **config,
        )


CELLS = {"ROWS": 128, "COLUMNS": 128, "STEP": 64, "STAGES": 4, "BAND": 16, "num_warps": 8}
"""Launch configuration of the cell scores where tiles come by TMA. Tiles of 128 x 256 are faster and were wrong under
triton 3.6 (they spill)."""


PEAKS = {"CONSUMERS": 3, "COLUMNS": 256, "STEP": 64, "STAGES": 3, "num_warps": 4}
RAGGED_PEAKS = {"CONSUMERS": 2, "COLUMNS": 256, "STEP": 64, "STAGES": 4, "num_warps": 4}
"""Launch configurations of the Hopper cell scores; where some block is cut short, counting a cell's pairs needs the
registers of fewer consumers."""


def cell_config(q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor | None, stride: int) -> dict[str, Any]:
    """Launch configuration of the cell scores: tiles by TMA (Hopper and later) where every group of tokens is whole and
    visible."""
    whole = visible is None and q.shape[2] % stride == 0 and k.shape[2] % stride == 0
    bulk = whole and q.element_size() == 2 and device.capability(q.device)[0] >= 9
    if bulk and all(
        x.data_ptr() % 16 == 0 and all(step % 8 == 0 and step > 0 for step in x.stride()[:3]) for x in (q, k)
    ):
        return {**CELLS, "BULK": True}
    tile, inner = (128, 64) if q.element_size() == 2 else (64, 32)
    return {"ROWS": tile, "COLUMNS": tile, "STEP": inner, "STAGES": 3, "BULK": False, "BAND": 1, "num_warps": 8}


def _groups(x: torch.Tensor, stride: int, groups: int, columns: int) -> Any:
    """Descriptor of x [B, H, n, d] as [B, H, n / stride, stride, d], one slot of ``groups`` groups a tile."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    batch, heads, length, width = x.shape
    b, h, n, _ = x.stride()
    return TensorDescriptor(
        x, [batch, heads, length // stride, stride, width], [b, h, n * stride, n, 1], [1, 1, groups, 1, columns]
    )


def peaks_on_hopper(q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor | None) -> bool:
    """Whether the Hopper template scores cells: 16-bit tensors that TMA can address, no key hidden by padding."""
    if visible is not None or q.element_size() != 2 or q.shape[-1] % 8 or device.capability(q.device)[0] != 9:
        return False
    return all(x.data_ptr() % 16 == 0 and all(step % 8 == 0 and step > 0 for step in x.stride()[:3]) for x in (q, k))


def _slots(x: torch.Tensor, stride: int, rows: int, columns: int) -> Any:
    """Gluon descriptor of the whole groups of x [B, H, n, d] as [B, H, stride, n / stride, d]; a tile is one slot of
    ``rows`` groups."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    batch, heads, length, width = x.shape
    b, h, n, _ = x.stride()
    block = [1, 1, 1, rows, columns]
    return TensorDescriptor(
        x,
        [batch, heads, stride, length // stride, width],
        [b, h, n, n * stride, 1],
        block,
        _slot_layout(rows, columns, x.dtype),
    )


def _quantized(x: torch.Tensor, block: int, first: int, blocks: int, module: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 copy [B, H, blocks * block, d to a multiple of 16] of the blocks from ``first`` on, zeros past the end;
    fp32 scales [B, H, blocks])."""
    batch, heads, length, head_dim = x.shape
    width = cdiv(head_dim, 16) * 16
    copy = torch.empty(batch, heads, blocks * block, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(batch, heads, blocks, dtype=torch.float32, device=x.device)
    module("quantize").quantize[(blocks, batch * heads)](
        x, copy, scale, x.stride()[:3], heads, length, first, BLOCK=block, WIDTH=width, num_warps=8
    )
    return copy, scale


@functools.lru_cache(maxsize=64)
def _slot_layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    names = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}
    return gl.NVMMASharedLayout.get_default_for([1, 1, 1, rows, columns], names[dtype])


def _released(peak: torch.Tensor) -> torch.Tensor:
    """Released code's value term: the log norm, z-scored over the blocks of a head, rectified. peak: [B, Hk,
    blocks]."""
    log = peak.clamp(min=torch.finfo(torch.float32).tiny).log()
    real = peak > 0
    count = real.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(real, log, 0).sum(-1, keepdim=True) / count
    spread = torch.where(real, (log - mean) ** 2, 0).sum(-1, keepdim=True) / count
    return ((log - mean) / (spread.sqrt() + 1e-6)).clamp(min=0)
