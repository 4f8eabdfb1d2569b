"""Block selection on a GPU: scores and lists, in row chunks so that scores stay small at any length. Nothing waits for
the device."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import sympy
import torch

from stem_compile import ops
from stem_compile.algebra.blocks import Shape, causal_offset, split
from stem_compile.algebra.masks import decode
from stem_compile.kernels.targets.cuda import direct
from stem_compile.kernels.targets.cuda.block_scores import KeySide, PairScores, module
from stem_compile.kernels.targets.cuda.descriptors import packed_heads
from stem_compile.kernels.targets.cuda.masses import Means
from stem_compile.kernels.triton.arguments import arguments
from stem_compile.selection import Attention
from stem_compile.selection.oam import hides_pairs
from stem_compile.selection.tpd import divided_counts, everything, row_counts

SCORE_BYTES = 1 << 28
"""Largest score buffer; longer prompts are scored in row chunks of it."""
CHUNK_UNIT = 128
"""Rows of a chunk come in multiples of it: whole tiles of the score kernels."""
SHARED_PAIRS = 1 << 16
"""Most scores that one program ranks to divide a row's budget among heads; more are ranked by torch."""


def select(attention: Attention, kernel: str) -> tuple[torch.Tensor, torch.Tensor]:
    """stem::select: (indices int32 [B, H, rows, width], counts int32 [B, H, rows])."""
    q, k, v = attention.q, attention.k, attention.v
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        attention = replace(attention, q=q, k=k, v=v)
    spec, mask, (rows, columns) = attention.spec, attention.mask, attention.blocks
    batch, heads, q_len, _ = q.shape
    width = ops.list_capacity(k, spec)
    indices = torch.empty(ops.selection_shape(q, k, spec), dtype=torch.int32, device=q.device)
    counts = torch.empty(ops.counts_shape(q, spec), dtype=torch.int32, device=q.device)
    if not counts.numel():
        return indices, counts
    padded, explicit = bool(mask.parts.keys), bool(mask.parts.others)
    first, possible, limits = _tables(attention, counts)
    first_stride = first.stride(0) if padded and first.shape[0] > 1 else 0
    strides = possible.stride() if explicit else (0, 0, 0, 0)
    terms = arguments(attention.tensors, attention.scalars, attention.mask_text, device=q.device)
    keys = _block_scores(attention, explicit, terms)
    step = rows if keys is None else min(rows, max(1, SCORE_BYTES // keys.bytes_a_row // CHUNK_UNIT) * CHUNK_UNIT)
    nb = 1 << (columns - 1).bit_length() if columns > 1 else 2
    lists: Any = module("select", attention)
    divides, together = keys is not None and spec.divides, spec.sharing_heads(heads, k.shape[1])
    thresholds = torch.empty_like(counts) if divides else counts
    for start in range(0, rows, step):
        chunk = min(step, rows - start)
        scores = counts if keys is None else keys.scores(start, chunk)
        pitch = scores.stride(-2)
        lengths = limits.stride()
        if divides:
            tables = first, possible, limits, counts, thresholds, first_stride, strides, lengths, pitch
            _divide(
                attention, lists, scores, start, chunk, together, (*tables, heads, together),
                (q_len, k.shape[2], *terms), counts, {"NB": nb, "PADDED": padded, "EXPLICIT": explicit},
            )  # fmt: skip
        direct.launch(
            lists.select, (chunk, batch * heads),
            scores, first, possible, limits, indices, counts, thresholds, first_stride, strides, lengths, pitch, heads,
            start, rows, columns, width, q_len, k.shape[2], *terms,
            NB=nb, SCORED=keys is not None, PADDED=padded, EXPLICIT=explicit, GIVEN=divides,
            PACKED=packed_heads(indices, counts), num_warps=max(1, min(16, nb // (256 if divides else 1024))),
        )  # fmt: skip
    return indices, counts


def _tables(attention: Attention, unused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(first visible key of each key block where keys are hidden by themselves; where pairs are, candidates as uint8
    [B, H, rows, columns] and the length of each row's list). unused: stands for one that the mask does not need."""
    parts, spec, (rows, columns) = attention.mask.parts, attention.spec, attention.blocks
    first = attention.mask.first_visible(spec.block_k) if parts.keys else unused
    if not parts.others:
        return first, unused, unused
    limits = row_counts(attention.candidates.sum(-1), spec, attention.reach).expand(*attention.q.shape[:2], rows)
    candidates = attention.candidates.expand(*attention.q.shape[:2], rows, columns)
    return first, candidates.view(torch.uint8), limits


def _block_scores(attention: Attention, explicit: bool, terms: Any) -> KeySide | PairScores | Means | None:
    """What scores the blocks; None where every row computes all that it sees. explicit: whether candidates are listed
    pair by pair. terms: ``arguments`` of mask and score."""
    if everything(attention.spec):
        return None
    if attention.spec.pooling == "mass":
        return Means(attention)
    if hides_pairs(attention):
        return PairScores(attention, terms)
    # Where the forced blocks are not simply the last before the diagonal, or that is known on the device only, every
    # score is written.
    plain = not explicit and not _reads_offset(attention.mask_text)
    before = _offset(attention.mask_text, attention.shape, tuple(attention.scalars)) if plain else None
    return KeySide(attention, before, plain, terms)


def _divide(
    attention: Attention,
    lists: Any,
    scores: torch.Tensor,
    start: int,
    chunk: int,
    together: int,
    places: tuple[Any, ...],
    sizes: tuple[Any, ...],
    counts: torch.Tensor,
    constants: dict[str, Any],
) -> None:
    """Write ``counts`` of rows [start, start + chunk) where heads share budgets or a coverage decides."""
    batch, heads = attention.shape[:2]
    rows, columns = attention.blocks
    width = 1 << (together - 1).bit_length()
    pairs = width * constants["NB"]
    if pairs <= SHARED_PAIRS:
        direct.launch(
            lists.divide, (chunk, batch * heads // together),
            scores, *places, start, chunk, rows, columns, *sizes,
            HEADS=width, num_warps=max(4, min(32, pairs // 1024)), **constants,
        )  # fmt: skip
        return
    some = slice(start, start + chunk)
    candidates = attention.candidates[:, :, some]
    full_counts = row_counts(attention.candidates.sum(-1), attention.spec, attention.reach)[:, :, some]
    scores = scores.masked_fill(~candidates, -torch.inf)
    counts[:, :, some] = divided_counts(scores, candidates, full_counts, attention.spec, together)


@functools.lru_cache(maxsize=1024)
def _offset(mask: str, shape: Shape, scalars: tuple[int, ...]) -> int | None:
    """Keys before the first query row under a causal term that reads no tensor; None without one."""
    return causal_offset(decode(mask), shape, (), scalars)


@functools.lru_cache(maxsize=1024)
def _reads_offset(mask: str) -> bool:
    """Whether the causal offset is a tensor's value."""
    causal = split(decode(mask)).causal
    return causal is not None and bool(sympy.sympify(causal).atoms(sympy.core.function.AppliedUndef))
