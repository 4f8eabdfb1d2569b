"""Block scores on CPUs: what ``oam.oam_scores`` defines, without copies of whole tensors and without the pairs a causal mask hides anyway.

Every tensor is read once, in pieces that stay in a core's cache: converted, summed or multiplied there. The maximum over cells multiplies
one chunk of query row blocks at a time with the keys it can see, and keeps one number a block pair.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from stem_compile import oam
from stem_compile.blocks import cdiv
from stem_compile.kernels import workers
from stem_compile.kernels.gather import dense
from stem_compile.selection import SelectionSpec

PIECE = 2048
"""Tokens read at once: 512 KiB in fp32 at width 64."""
TALL = 384
"""Rows of a product of cells, all heads of a group together."""


def scores(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None, candidates: torch.Tensor, spec: SelectionSpec, scale: float
) -> torch.Tensor:
    """As ``oam.oam_scores``: [B, H, query blocks, key blocks], fp32 (fp64 for fp64 inputs); -inf where ``candidates`` is False."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    pool = {"mean": _mean, "max": _max}[spec.pooling]
    result = pool(q, k, visible, candidates, spec, dtype).mul_(scale)
    norms = q.new_empty(v.shape[:3], dtype=dtype)
    workers.run(lambda at: torch.linalg.vector_norm(_rows(v, at, dtype), dim=-1, out=norms[at]), _pieces(v, PIECE))
    # The norm of a norm is itself: the definition does the rest.
    magnitude = oam._value_term(norms.unsqueeze(-1), visible, spec, dtype).mul_(spec.beta)
    result.unflatten(1, (k.shape[1], -1)).add_(magnitude[:, :, None, None])
    return result.masked_fill_(~candidates, -torch.inf)


At = tuple[int, int, slice]
"""(batch row, head, tokens)."""


def _pieces(x: torch.Tensor, tokens: int) -> Iterator[At]:
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            for start in range(0, x.shape[2], tokens):
                yield b, h, slice(start, min(start + tokens, x.shape[2]))


def _rows(x: torch.Tensor, at: At, dtype: torch.dtype) -> torch.Tensor:
    return dense(x[at], dtype, x.shape[3])


def _present(length: int, visible: torch.Tensor | None, block: int, stride: int, dtype: torch.dtype) -> torch.Tensor:
    """1 for tokens that exist and are visible: [B or 1, blocks, groups, stride]."""
    present = torch.ones(1, length, dtype=dtype) if visible is None else visible.to(dtype)
    blocks = cdiv(length, block)
    return F.pad(present, (0, blocks * block - length)).view(-1, blocks, block // stride, stride)


def _mean(q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor | None, candidates: torch.Tensor, spec: SelectionSpec, dtype: torch.dtype) -> torch.Tensor:
    stride = min(spec.stride, spec.block_q, spec.block_k)
    q_sum = _group_sums(q, None, spec.block_q, stride, dtype).flatten(3)
    k_sum = _group_sums(k, visible, spec.block_k, stride, dtype).flip(3).flatten(3)
    q_count = _present(q.shape[2], None, spec.block_q, stride, dtype).sum(2)
    k_count = _present(k.shape[2], visible, spec.block_k, stride, dtype).sum(2).flip(2)
    pairs = (q_count @ k_count.transpose(1, 2)).clamp_(min=1)
    return oam._grouped_product(q_sum, k_sum).div_(pairs[:, None])


def _group_sums(x: torch.Tensor, visible: torch.Tensor | None, block: int, stride: int, dtype: torch.dtype) -> torch.Tensor:
    """Sums over a block's groups of ``stride`` tokens: [B, heads, blocks, stride, width]; hidden tokens count as zero."""
    blocks = cdiv(x.shape[2], block)
    sums = x.new_empty(*x.shape[:2], blocks, stride, x.shape[3], dtype=dtype)

    def add(at: At) -> None:
        b, h, tokens = at
        first, count = tokens.start // block, cdiv(tokens.stop - tokens.start, block)
        piece = dense(x[at], dtype, x.shape[3], count * block)
        if visible is not None:
            seen = visible[b % len(visible), tokens]
            if not bool(seen.all()):
                piece = piece.where(F.pad(seen, (0, len(piece) - len(seen)))[:, None], 0)
        torch.sum(piece.view(count, -1, stride, x.shape[3]), 1, out=sums[b, h, first : first + count])

    workers.run(add, _pieces(x, max(1, PIECE // block) * block))
    return sums


def _max(q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor | None, candidates: torch.Tensor, spec: SelectionSpec, dtype: torch.dtype) -> torch.Tensor:
    stride = min(spec.stride, spec.block_q, spec.block_k)
    rows, columns = candidates.shape[2:]
    group, width = q.shape[1] // k.shape[1], stride * q.shape[3]
    cells_q, cells_k = spec.block_q // stride, spec.block_k // stride
    keys = _reversed_groups(k, visible, spec.block_k, stride, dtype)
    q_present = _present(q.shape[2], None, spec.block_q, stride, dtype)[0]
    k_present = _present(k.shape[2], visible, spec.block_k, stride, dtype).flip(3).flatten(1, 2)
    whole = bool(q_present.all()) and bool(k_present.all())
    peaks = q.new_zeros(q.shape[0], q.shape[1], rows, columns, dtype=dtype)
    # Columns that any row of a batch row up to this one sees: what lies beyond is hidden whatever its score.
    seen = (candidates.any(1) * torch.arange(1, columns + 1)).amax(-1).cummax(-1).values.expand(q.shape[0], -1).tolist()
    step = max(1, TALL // (group * cells_q))

    def peak(piece: tuple[int, int, range]) -> None:
        b, h, some = piece
        reach = seen[b][some[-1]]
        if not reach:
            return
        heads = slice(h * group, (h + 1) * group)
        tokens = slice(some.start * spec.block_q, some.stop * spec.block_q)
        queries = dense(q[b, heads, tokens], dtype, q.shape[3], len(some) * spec.block_q).view(-1, width)
        cells = queries @ keys[b, h, : reach * cells_k].t()
        if not whole:
            pairs = q_present[some.start : some.stop].flatten(0, 1) @ k_present[b % len(k_present), : reach * cells_k].t()
            cells.view(group, -1, reach * cells_k).div_(pairs.clamp(min=1)).masked_fill_(pairs == 0, -torch.inf)
        found = cells.view(group, len(some), cells_q, reach * cells_k).amax(2).unflatten(-1, (reach, cells_k)).amax(-1)
        peaks[b, heads, some.start : some.stop, :reach] = found.div_(stride) if whole else found.nan_to_num_(neginf=0.0)

    chunks = [range(start, min(start + step, rows)) for start in range(0, rows, step)]
    # Heavy chunks first: the last ones decide when all threads are done.
    workers.run(peak, [(b, h, some) for some in reversed(chunks) for b in range(q.shape[0]) for h in range(k.shape[1])])
    return peaks


def _reversed_groups(k: torch.Tensor, visible: torch.Tensor | None, block: int, stride: int, dtype: torch.dtype) -> torch.Tensor:
    """Groups of ``stride`` keys, last key first: [B, Hk, key blocks * block / stride, stride * width]; hidden keys are zero."""
    length = cdiv(k.shape[2], block) * block
    made = k.new_zeros(*k.shape[:2], length // stride, stride, k.shape[3], dtype=dtype)
    made.flatten(2, 3)[:, :, : k.shape[2]] = k if visible is None else k.where(visible[:, None, :, None], 0)
    return made.flip(3).flatten(3)
