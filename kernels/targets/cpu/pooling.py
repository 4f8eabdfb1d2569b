"""Selection on CPUs: what ``oam.oam_scores`` and ``tpd.tpd_select`` define, in pieces that stay in a core's cache.

Keys and values are summarised once; then every piece of query row blocks is scored and ranked on its own. No tensor is
copied whole, no block score outlives its piece, and the maximum over cells multiplies only with the keys that the piece
can see.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from stem_compile.algebra.blocks import cdiv
from stem_compile.algebra.scores import block_positions
from stem_compile.algebra.symbolic import KV, B, H, Q
from stem_compile.kernels.targets.cpu import workers
from stem_compile.kernels.targets.cpu.gather import dense
from stem_compile.selection import Attention
from stem_compile.selection.oam import hides_pairs, scores_of_pairs, value_term
from stem_compile.selection.tpd import best_blocks

PIECE = {"mean": 1 << 15, "max": 1 << 13}
"""Tokens read at once, the heads of a group counted apart. Smaller would fit the caches better, but short calls wait
for the interpreter lock."""

PAIRS = 1 << 20
"""Cells looked at in one piece where single pairs are hidden."""

At = tuple[int, int, slice]
"""(batch row, key head, tokens)."""


def ranked(attention: Attention, counts: torch.Tensor, width: int) -> torch.Tensor:
    """Each row's ``counts`` best blocks, ascending: int32 [B, H, query blocks, width]. Ties go to the earlier block.

    counts: int32 [B or 1, H or 1, query blocks]; rows with none or ``FULL`` are left as garbage.
    """
    if hides_pairs(attention):
        return _ranked_by_pairs(attention, counts, width)
    q, k, spec, candidates = attention.q, attention.k, attention.spec, attention.candidates
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = _Keys(attention, dtype)
    indices = q.new_empty(q.shape[0], q.shape[1], *candidates.shape[2:3], width, dtype=torch.int32)
    q_present = _present(q.shape[2], None, spec.block_q, keys.stride, dtype)[0]
    group = attention.group
    places = block_positions(*attention.blocks, attention.shape, spec.block_q, spec.block_k, q.device)

    def rank(at: At) -> None:
        b, h, tokens = at
        rows = slice(tokens.start // spec.block_q, cdiv(tokens.stop, spec.block_q))
        heads = slice(h * group, (h + 1) * group)
        kept, possible = (x[b % len(x), heads if x.shape[1] > 1 else slice(None), rows] for x in (counts, candidates))
        if int(kept.max()) <= 0:
            indices[b, heads, rows] = 0
            return
        # Blocks beyond all of the piece's rows' sight need no score.
        reach = int((possible.flatten(0, 1).any(0) * torch.arange(1, possible.shape[2] + 1)).max())
        queries = _padded(q[b, heads, tokens], dtype, possible.shape[1] * spec.block_q).unflatten(
            1, (possible.shape[1], -1, keys.stride)
        )
        pooled = keys.pooled(b, h, queries, q_present[rows], reach).mul_(attention.scale)
        if attention.score.positional:
            here = {
                B: torch.tensor(b),
                H: places[H][0, heads],
                Q: places[Q][0, :, rows],
                KV: places[KV][0, ..., :reach],
            }
            pooled = attention.score.apply(pooled, attention.mask.environment | here)
        scores = pooled + keys.values[b, h, :reach]
        indices[b, heads, rows] = best_blocks(scores, possible[:, :, :reach], kept, width, spec)

    # Late rows see most: the last piece to finish had better be a small one.
    workers.run(rank, reversed(list(_pieces(k, q.shape[2], PIECE[spec.pooling] // group, spec.block_q))))
    return indices


def _ranked_by_pairs(attention: Attention, counts: torch.Tensor, width: int) -> torch.Tensor:
    """``ranked`` where single pairs are hidden: some rows of all heads at a time."""
    (batch, heads, _, kv_len), spec = attention.shape, attention.spec
    rows, candidates = attention.blocks[0], attention.candidates
    indices = attention.q.new_zeros(batch, heads, rows, width, dtype=torch.int32)
    stride = min(spec.stride, spec.block_q, spec.block_k)
    step = max(1, PAIRS // (batch * heads * (spec.block_q // stride) * cdiv(kv_len, stride)))

    def rank(piece: slice) -> None:
        kept, possible = counts[:, :, piece], candidates[:, :, piece]
        if int(kept.max()) > 0:
            shown = possible.flatten(0, 2).any(0).nonzero()[:, 0]
            part = slice(int(shown[0]), int(shown[-1]) + 1)
            scores = scores_of_pairs(attention, piece, part)
            indices[:, :, piece] = best_blocks(scores, possible[..., part], kept, width, spec) + part.start

    workers.run(rank, [slice(start, min(start + step, rows)) for start in range(0, rows, step)][::-1])
    return indices


class _Keys:
    """What a score needs of keys and values: summaries (or reversed groups, for the maximum), presence and the value
    term."""

    def __init__(self, attention: Attention, dtype: torch.dtype) -> None:
        k, v, spec, visible = attention.k, attention.v, attention.spec, attention.mask.visible
        self.stride = stride = min(spec.stride, spec.block_q, spec.block_k)
        self.peak = spec.pooling == "max"
        self.cells = spec.block_k // stride if self.peak else 1
        groups = cdiv(k.shape[2], spec.block_k) * self.cells
        # [B, Hk, groups, stride, d], the last key of a group first.
        self.keys = k.new_empty(*k.shape[:2], groups, stride, k.shape[3], dtype=dtype)
        norms_of_blocks = v.new_empty(*v.shape[:2], cdiv(v.shape[2], spec.block_k), dtype=dtype)

        def summarise(at: At) -> None:
            b, h, tokens = at
            blocks = slice(tokens.start // spec.block_k, cdiv(tokens.stop, spec.block_k))
            piece = _padded(k[at], dtype, (blocks.stop - blocks.start) * spec.block_k)
            norms = torch.linalg.vector_norm(v[at].to(dtype), dim=-1)
            if visible is not None:
                shown = visible[b % len(visible), tokens]
                norms = norms.where(shown, 0)
                piece = piece.where(F.pad(shown, (0, len(piece) - len(shown)))[:, None], 0)
            norms_of_blocks[b, h, blocks] = F.pad(norms, (0, len(piece) - len(norms))).view(-1, spec.block_k).amax(-1)
            piece = (
                piece.unflatten(0, (-1, stride))
                if self.peak
                else piece.unflatten(0, (blocks.stop - blocks.start, -1, stride)).sum(1)
            )
            self.keys[b, h, blocks.start * self.cells : blocks.stop * self.cells] = piece.flip(1)

        workers.run(summarise, _pieces(k, k.shape[2], PIECE[spec.pooling], spec.block_k))
        present = _present(k.shape[2], visible, spec.block_k, stride, dtype)
        # [B or 1, groups, stride]: how many keys each entry sums.
        self.present = (present.flatten(1, 2) if self.peak else present.sum(2)).flip(2)
        self.whole = bool(present.all())
        self.values = value_term(norms_of_blocks, spec.metric) * spec.beta

    def pooled(self, b: int, h: int, queries: torch.Tensor, present: torch.Tensor, reach: int) -> torch.Tensor:
        """Pooled products [heads, rows, reach] of queries [heads, rows, groups, stride, d] of one key head; present
        [rows, groups, stride]: 1 for queries that exist."""
        keys, count = (
            self.keys[b, h, : reach * self.cells].flatten(1),
            self.present[b % len(self.present), : reach * self.cells],
        )
        if not self.peak:
            pairs = present.sum(1) @ count.t()
            pooled = (queries.sum(2).flatten(2) @ keys.t()).div_(pairs.clamp_(min=1))
        else:
            heads, rows = queries.shape[:2]
            cells = queries.flatten(0, 2).flatten(1) @ keys.t()
            if self.whole and bool(present.all()):
                cells.div_(self.stride)
            else:
                pairs = present.flatten(0, 1) @ count.t()
                cells.view(heads, *pairs.shape).div_(pairs.clamp(min=1)).masked_fill_(pairs == 0, -torch.inf)
            pooled = (
                cells.view(heads * rows, -1, reach * self.cells)
                .amax(1)
                .view(heads, rows, reach, self.cells)
                .amax(-1)
                .nan_to_num_(neginf=0.0)
            )
        return pooled


def _pieces(k: torch.Tensor, length: int, tokens: int, block: int) -> Iterator[At]:
    """About ``tokens`` tokens each, whole blocks, of ``length`` for every key head."""
    step = max(1, tokens // block) * block
    for start in range(0, length, step):
        for b, h in itertools.product(range(k.shape[0]), range(k.shape[1])):
            yield b, h, slice(start, min(start + step, length))


def _padded(x: torch.Tensor, dtype: torch.dtype, length: int) -> torch.Tensor:
    """x [..., tokens, d] in ``dtype``, zeros up to ``length`` tokens; a view where that is all it takes."""
    return x if x.dtype == dtype and x.shape[-2] == length else dense(x, dtype, x.shape[-1], length)


def _present(length: int, visible: torch.Tensor | None, block: int, stride: int, dtype: torch.dtype) -> torch.Tensor:
    """1 for tokens that exist and are visible: [B or 1, blocks, groups, stride]."""
    present = torch.ones(1, length, dtype=dtype) if visible is None else visible.to(dtype)
    blocks = cdiv(length, block)
    return F.pad(present, (0, blocks * block - length)).view(-1, blocks, block // stride, stride)
