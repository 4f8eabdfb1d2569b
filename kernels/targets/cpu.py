"""CPU target: block-sparse attention out of ATen calls, one query row block at a time; memory grows linearly with the length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from stem_compile import blocks, ops, policies
from stem_compile.masks import Mask, decode
from stem_compile.oam import oam_scores
from stem_compile.selection import FULL, SelectionSpec, parse
from stem_compile.tpd import tpd_select

_SHORT = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


def kernel_name(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: str, spec: str) -> str:
    """Name of what ``attend`` runs, from shapes and dtypes alone: fake tensors will do."""
    chosen = parse(spec)
    return f"cpu gather {_SHORT[q.dtype]} {chosen.block_q}x{chosen.block_k}"


def select_name(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: str, spec: str) -> str:
    """Name of what ``select`` runs."""
    chosen = parse(spec)
    return f"cpu {chosen.pooling if policies.get(chosen.policy).SCORED else 'unscored'} {chosen.block_q}x{chosen.block_k}"


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
    """Blocks to compute: indices int32 [B, H, query blocks, width] ascending, counts int32 [B, H, query blocks]."""
    return _select(q, k, v, tensors, scalars, decode(mask), scale, parse(spec))


def _select(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Sequence[torch.Tensor], scalars: Sequence[int], mask: Mask, scale: float, spec: SelectionSpec
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    found = blocks.candidates(mask, shape, tensors, scalars, spec.block_q, spec.block_k, q.device)
    if policies.get(spec.policy).SCORED:
        scores = oam_scores(q, k, v, blocks.key_visible(mask, shape, tensors, scalars, q.device), found, spec, scale)
    else:
        scores = torch.where(found, 0.0, -torch.inf).expand(*shape[:2], -1, -1)
    chosen = tpd_select(scores, spec)
    return chosen.indices, chosen.counts


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    scalars: Sequence[int],
    mask: str,
    scale: float,
    spec: str,
    kernel: str,
) -> torch.Tensor:
    """Softmax attention over the visible keys of the selected blocks; a row without any gives 0.

    q: [B, H, q_len, d]. k: [B, Hk, kv_len, d], v: [B, Hk, kv_len, dv]. indices, counts: as ``select`` returns. Result: ``ops.attention_output``.
    """
    return _attend(q, k, v, indices, counts, tensors, scalars, decode(mask), scale, parse(spec))


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, counts: torch.Tensor, tensors: Sequence[torch.Tensor], scalars: Sequence[int],
    mask: Mask, scale: float, spec: SelectionSpec,
) -> torch.Tensor:  # fmt: skip
    batch, heads, q_len, _ = q.shape
    key_heads, kv_len = k.shape[1:3]
    shape = (batch, heads, q_len, kv_len)
    keys, values = (_blocked(x, spec.block_k) for x in (k, v))
    columns = keys.shape[1]
    found = blocks.candidates(mask, shape, tensors, scalars, spec.block_q, spec.block_k, q.device).expand(batch, heads, -1, columns)
    out = ops.attention_output(q, v)
    lengths = counts.tolist()
    group = heads // key_heads
    for row, start in enumerate(range(0, q_len, spec.block_q)):
        rows = slice(start, min(start + spec.block_q, q_len))
        visible = mask.dense(shape, tensors, scalars, q.device, rows).expand(batch, heads, -1, kv_len)
        visible = F.pad(visible, (0, columns * spec.block_k - kv_len)).unflatten(-1, (columns, spec.block_k))
        for b in range(batch):
            for h in range(heads):
                count = lengths[b][h][row]
                listed = found[b, h, row].nonzero()[:, 0] if count == FULL else indices[b, h, row, :count].long()
                base = (b * key_heads + h // group) * columns
                key, value = (x.view(-1, *x.shape[2:]).index_select(0, listed + base).flatten(0, 1)[None] for x in (keys, values))
                seen = visible[b, h].index_select(1, listed).flatten(1)
                out[b, h, rows] = F.scaled_dot_product_attention(q[b, h, None, rows], key, value, attn_mask=seen[None], scale=scale)[0] if len(key[0]) else 0
    return out


def _blocked(x: torch.Tensor, block: int) -> torch.Tensor:
    """[B, heads, length, d] -> [B * heads, blocks, block, d], the last block filled with zeros."""
    columns = blocks.cdiv(x.shape[2], block)
    return F.pad(x, (0, 0, 0, columns * block - x.shape[2])).reshape(-1, columns, block, x.shape[3])
