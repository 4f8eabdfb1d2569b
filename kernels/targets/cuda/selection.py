"""Block selection on a GPU: scores and lists, in row chunks so that scores stay small at any length. Nothing waits for
the device."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import sympy
import torch

from stem_compile import ops
from stem_compile.algebra.blocks import split
from stem_compile.algebra.masks import decode
from stem_compile.kernels.targets.cuda.block_scores import KeySide, PairScores, module
from stem_compile.kernels.triton.arguments import arguments
from stem_compile.selection import Attention
from stem_compile.selection.oam import hides_pairs
from stem_compile.selection.tpd import everything, row_counts

SCORE_BYTES = 1 << 28
"""Largest score buffer; longer prompts are scored in row chunks of it."""
CHUNK_UNIT = 128
"""Rows of a chunk come in multiples of it: whole tiles of the score kernels."""


def select(attention: Attention, kernel: str) -> tuple[torch.Tensor, torch.Tensor]:
    """stem::select: (indices int32 [B, H, rows, width], counts int32 [B, H, rows])."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (attention.q, attention.k, attention.v))
    attention = replace(attention, q=q, k=k, v=v)
    spec, mask, (rows, columns) = attention.spec, attention.mask, attention.blocks
    batch, heads, q_len, _ = q.shape
    *index_shape, width = ops.selection_shape(q, k, spec)
    indices = torch.empty(*index_shape, width, dtype=torch.int32, device=q.device)
    counts = torch.empty(index_shape, dtype=torch.int32, device=q.device)
    if not counts.numel():
        return indices, counts
    padded, explicit = bool(mask.parts.keys), bool(mask.parts.others)
    first = possible = limits = counts
    first_stride, strides = 0, tuple([0] * 4)
    if padded:
        first = mask.first_visible(spec.block_k)
        first_stride = first.stride(0) if first.shape[0] > 1 else 0
    if explicit:
        limits = row_counts(attention.candidates.sum(-1), spec, attention.reach).expand(batch, heads, rows)
        possible = attention.candidates.expand(batch, heads, rows, columns).view(torch.uint8)
        strides = possible.stride()
    terms = arguments(attention.tensors, attention.scalars, attention.mask_text, device=q.device)
    keys: KeySide | PairScores | None = None
    if not everything(spec) and hides_pairs(attention):
        keys = PairScores(attention, terms)
    elif not everything(spec):
        # Where the forced blocks are not simply the last before the diagonal, or that is known on the device only,
        # every score is written.
        plain = not explicit and not _reads_offset(attention.mask_text)
        keys = KeySide(attention, mask.causal_offset if plain else None, plain, terms)
    step = rows if keys is None else min(rows, max(1, SCORE_BYTES // keys.bytes_a_row // CHUNK_UNIT) * CHUNK_UNIT)
    nb = 1 << (columns - 1).bit_length() if columns > 1 else 2
    lists: Any = module("select", attention)
    for start in range(0, rows, step):
        chunk = min(step, rows - start)
        lists.select[(chunk, batch * heads)](
            counts if keys is None else keys.scores(start, chunk),
            first,
            possible,
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
            k.shape[2],
            *terms,
            NB=nb,
            SCORED=keys is not None,
            PADDED=padded,
            EXPLICIT=explicit,
            num_warps=max(1, min(16, nb // 1024)),
        )
    return indices, counts


@functools.lru_cache(maxsize=1024)
def _reads_offset(mask: str) -> bool:
    """Whether the causal offset is a tensor's value."""
    causal = split(decode(mask)).causal
    return causal is not None and bool(sympy.sympify(causal).atoms(sympy.core.function.AppliedUndef))
