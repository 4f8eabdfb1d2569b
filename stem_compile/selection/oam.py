"""Output-Aware Metric: block scores that rank keys by what they do to the output (arXiv 2603.06274, Eq. 5-7, section
3.1).

M(q block, k block) = scale * pool(q.k over the pair's anti-diagonals) + beta * max(0, log max ||v||_2). Tokens are
grouped by ``stride``; query s of a group meets key stride-1-s, as in XAttention. The mean over all cells of a pair is
one dot product of two summaries (group sums), so it costs 2 * stride * d operations a pair; the maximum over cells is
not linear and costs (block / stride)^2 times more.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from stem_compile.algebra.blocks import cdiv
from stem_compile.algebra.scores import block_positions
from stem_compile.algebra.symbolic import KV, Q
from stem_compile.selection import Attention, SelectionSpec

CELL_ROWS = 64
"""Query row blocks whose cells exist at once under max pooling."""


def oam_scores(attention: Attention) -> torch.Tensor:
    """Scores [B, H, query blocks, key blocks], fp32 (fp64 for fp64 inputs); -inf where no score is visible.

    What is hidden does not count: a mean is over the token pairs that exist and are visible, a norm is of a key that
    is. A score that depends on positions is applied where blocks see it (``scores.block_positions``).
    Under mass pooling: ``mass.log_masses``.
    """
    if attention.spec.pooling == "mass":
        from stem_compile.selection import mass

        return mass.log_masses(attention)
    rows, columns = attention.blocks
    if hides_pairs(attention):
        pieces = (slice(start, start + CELL_ROWS) for start in range(0, rows, CELL_ROWS))
        scores = torch.cat([scores_of_pairs(attention, piece, slice(0, columns)) for piece in pieces], 2)
        return scores.masked_fill_(~attention.candidates, -torch.inf)
    q, k, v, spec = attention.q, attention.k, attention.v, attention.spec
    visible, dtype = attention.mask.visible, _dtype(attention)
    pool = {"mean": _mean_over_cells, "max": _max_over_cells}[spec.pooling]
    pooled = positioned(attention, pool(q, k, visible, spec, dtype) * attention.scale)
    values = value_term(largest_norms(v, visible, spec, dtype), spec.metric).repeat_interleave(attention.group, 1)
    return (pooled + spec.beta * values[:, :, None, :]).masked_fill_(~attention.candidates, -torch.inf)


def _dtype(attention: Attention) -> torch.dtype:
    return torch.float64 if attention.q.dtype == torch.float64 else torch.float32


def hides_pairs(attention: Attention) -> bool:
    """Whether a key that a row of blocks does not see may lie in a block whose score counts: under documents or a given
    tensor. Blocks are then summed up for each row anew. The blocks that the mask's edges cut are the first and the last
    of a row, which are computed whatever their score, where both are kept."""
    parts = attention.mask.parts
    return bool(parts.others or (parts.bands and (attention.spec.sinks == 0 or parts.causal is None)))


def positioned(
    attention: Attention, pooled: torch.Tensor, rows: slice = slice(None), columns: slice = slice(None)
) -> torch.Tensor:
    """Pooled, scaled products [B, H, rows, columns] of some blocks, with a score that depends on positions applied."""
    if not attention.score.positional:
        return pooled
    spec = attention.spec
    places = block_positions(*attention.blocks, attention.shape, spec.block_q, spec.block_k, attention.device)
    places = places | {Q: places[Q][:, :, rows], KV: places[KV][..., columns]}
    return attention.score.apply(pooled, attention.mask.environment | places)


def scores_of_pairs(attention: Attention, rows: slice, columns: slice) -> torch.Tensor:
    """``oam_scores`` of some rows and key blocks, which hold all that the rows see, where single pairs are hidden: [B,
    H, rows, columns], finite also where no pair is visible. One product and one look at the mask for each token of a
    group."""
    q, spec, dtype = attention.q, attention.spec, _dtype(attention)
    stride = min(spec.stride, spec.block_q, spec.block_k)
    cells_q, cells_k = spec.block_q // stride, spec.block_k // stride
    first, stop = rows.start * spec.block_q, min(rows.stop, attention.blocks[0]) * spec.block_q
    queries = F.pad(q[:, :, first:stop], (0, 0, 0, max(0, stop - q.shape[2])))
    begin, end = columns.start * spec.block_k, columns.stop * spec.block_k
    keys, values = attention.k[:, :, begin:end], attention.v[:, :, begin:end]
    norms, missing = torch.linalg.vector_norm(values, dim=-1, dtype=dtype), end - begin - keys.shape[2]
    keys, norms = F.pad(keys, (0, 0, 0, missing)), F.pad(norms, (0, missing)).repeat_interleave(attention.group, 1)
    total: torch.Tensor | float = 0.0
    count: torch.Tensor | int = 0
    largest: torch.Tensor | None = None
    for slot in range(stride):
        other = stride - 1 - slot
        row, key = (
            torch.arange(a, b, stride, device=q.device) for a, b in ((first + slot, stop), (begin + other, end))
        )
        visible = attention.mask.at(row, key)
        product = _grouped_product(queries[:, :, slot::stride].to(dtype), keys[:, :, other::stride].to(dtype))
        # Not by a factor of 0: what is hidden may be NaN.
        total = total + torch.where(visible, product, 0)
        count = count + visible.to(dtype)
        shown = visible.unflatten(2, (-1, cells_q)).any(3)
        norm = torch.where(shown, norms[:, :, None, other::stride], 0).unflatten(3, (-1, cells_k)).amax(-1)
        largest = norm if largest is None else torch.maximum(largest, norm)
    assert isinstance(total, torch.Tensor) and isinstance(count, torch.Tensor) and largest is not None
    if spec.pooling == "mean":
        total, count = (_blocks_of(x, cells_q, cells_k).sum((3, 5)) for x in (total, count))
        pooled = total / count.clamp(min=1)
    else:
        cells = (total / count.clamp(min=1)).masked_fill_(count == 0, -torch.inf)
        pooled = _blocks_of(cells, cells_q, cells_k).amax((3, 5)).nan_to_num_(neginf=0.0)
    scores: torch.Tensor = positioned(attention, pooled * attention.scale, rows, columns)
    return scores.add(value_term(largest, spec.metric), alpha=spec.beta)


def _blocks_of(cells: torch.Tensor, cells_q: int, cells_k: int) -> torch.Tensor:
    """[B, H, rows, cells_q, columns, cells_k] of [B, H, rows * cells_q, columns * cells_k]."""
    batch, heads, height, width = cells.shape
    return cells.reshape(batch, heads, height // cells_q, cells_q, width // cells_k, cells_k)


def _grouped(
    x: torch.Tensor, visible: torch.Tensor | None, block: int, stride: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [B, heads, blocks, groups, stride, d] with absent tokens zero, presence [B or 1, 1, blocks, groups,
    stride])."""
    length = x.shape[2]
    blocks = cdiv(length, block)
    present = torch.ones(1, length, dtype=torch.bool, device=x.device) if visible is None else visible
    if visible is not None:
        x = torch.where(present[:, None, :, None], x, 0)
    x = F.pad(x, (0, 0, 0, blocks * block - length))
    present = F.pad(present, (0, blocks * block - length))
    groups = (blocks, block // stride, stride)
    return x.unflatten(2, groups), present[:, None].unflatten(2, groups).to(dtype)


def _mean_over_cells(
    q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor | None, spec: SelectionSpec, dtype: torch.dtype
) -> torch.Tensor:
    stride_q, stride_k = min(spec.stride, spec.block_q), min(spec.stride, spec.block_k)
    queries, q_present = _grouped(q, None, spec.block_q, stride_q, dtype)
    keys, k_present = _grouped(k, visible, spec.block_k, stride_k, dtype)
    q_sum = queries.sum(3, dtype=dtype).flatten(3)
    k_sum = keys.sum(3, dtype=dtype).flip(3).flatten(3)
    pairs = q_present.sum(3) @ k_present.sum(3).flip(3).transpose(-1, -2)
    return _grouped_product(q_sum, k_sum) / pairs.clamp(min=1)


def _max_over_cells(
    q: torch.Tensor, k: torch.Tensor, visible: torch.Tensor | None, spec: SelectionSpec, dtype: torch.dtype
) -> torch.Tensor:
    stride = min(spec.stride, spec.block_q, spec.block_k)
    queries, q_present = _grouped(q, None, spec.block_q, stride, dtype)
    keys, k_present = _grouped(k, visible, spec.block_k, stride, dtype)
    keys = keys.to(dtype).flip(4).flatten(2, 3).flatten(3)
    k_present = k_present.flip(4).flatten(2, 3).transpose(-1, -2)
    cells_q, cells_k = spec.block_q // stride, spec.block_k // stride
    peaks = []
    for start in range(0, queries.shape[2], CELL_ROWS):
        rows = slice(start, start + CELL_ROWS)
        pairs = q_present[:, :, rows].flatten(2, 3) @ k_present
        cells = _grouped_product(queries[:, :, rows].to(dtype).flatten(2, 3).flatten(3), keys) / pairs.clamp(min=1)
        cells = cells.masked_fill_(pairs == 0, -torch.inf)
        peaks.append(cells.unflatten(-1, (-1, cells_k)).amax(-1).unflatten(2, (-1, cells_q)).amax(3))
    return torch.cat(peaks, 2).nan_to_num_(neginf=0.0)


def _grouped_product(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """[B, H, m, c] x [B, Hk, n, c] -> [B, H, m, n], query heads sharing their key head without repeating it."""
    batch, heads, m, width = q.shape
    group = heads // k.shape[1]
    return (q.reshape(batch, k.shape[1], group * m, width) @ k.transpose(-1, -2)).view(batch, heads, m, k.shape[2])


def largest_norms(
    v: torch.Tensor, visible: torch.Tensor | None, spec: SelectionSpec, dtype: torch.dtype
) -> torch.Tensor:
    """Largest ||v|| of each key block's visible keys, 0 without one: [B, Hk, key blocks]."""
    norm = torch.linalg.vector_norm(v, dim=-1, dtype=dtype)
    if visible is not None:
        norm = torch.where(visible[:, None], norm, 0)
    blocks = cdiv(v.shape[2], spec.block_k)
    padded = F.pad(norm, (0, blocks * spec.block_k - v.shape[2]))
    return padded.view(*padded.shape[:2], blocks, spec.block_k).amax(-1)


def value_term(norms: torch.Tensor, metric: str) -> torch.Tensor:
    """max(0, log ||v||) of each block's largest norm [..., key blocks], 0 for a block without keys. "released"
    z-scores the logarithms over the sequence first, as the authors' code does, so it sees later tokens."""
    log = norms.clamp(min=torch.finfo(torch.float32).tiny).log()
    if metric == "released":
        real = norms > 0
        count = real.sum(-1, keepdim=True).clamp(min=1)
        mean = torch.where(real, log, 0).sum(-1, keepdim=True) / count
        spread = torch.where(real, (log - mean) ** 2, 0).sum(-1, keepdim=True) / count
        log = (log - mean) / (spread.sqrt() + 1e-6)
    term: torch.Tensor = log.clamp(min=0)
    return term
