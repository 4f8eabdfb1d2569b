"""The oracle: block-sparse attention in plain torch, one query block at a time, exact in fp64.

It defines what every kernel must compute: softmax over exactly the visible keys of the selected blocks, with the scores
modified and the sink joined where the attention has them; a row without any visible key gives 0. (What a softmax over
hidden scores gives it instead is added behind the operator, by ``average_blind.py``, the same for all kernels; where
that is no mean, ``blind_attention`` computes it.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import sympy
import torch

from stem_compile import ops
from stem_compile.algebra import scores
from stem_compile.algebra.blind import ELEMENTS
from stem_compile.algebra.masks import environment
from stem_compile.algebra.symbolic import KV, B, H, Q
from stem_compile.selection import Attention, BlockSelection


def sparse_attention(attention: Attention, selection: BlockSelection) -> torch.Tensor:
    """[B, H, q_len, dv] in q's dtype, computed in at least fp32, over the visible keys of the selected blocks."""
    q, k, v = attention.q, attention.k, attention.v
    shape, mask, score = attention.shape, attention.mask, attention.score
    batch, heads, q_len, kv_len = shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    computed = selection.dense(mask.candidates(selection.block_q, selection.block_k))
    out = ops.attention_output(q, v)
    keys, values = (x.to(dtype).repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    sink = score.sink_logits(shape, attention.tensors, attention.scalars, keys)
    axes = [torch.arange(n, device=q.device).view([-1 if i == j else 1 for j in range(4)]) for i, n in enumerate(shape)]
    tensors = [t.to(dtype) if t.is_floating_point() else t for t in attention.tensors]
    env = environment(shape, tensors, attention.scalars) | dict(zip((B, H, Q, KV), axes))
    for block, start in enumerate(range(0, q_len, selection.block_q)):
        rows = slice(start, min(start + selection.block_q, q_len))
        product = q[:, :, rows].to(dtype) @ keys.transpose(-1, -2) * attention.scale
        logits = score.apply(product, env | {Q: axes[2][:, :, rows]})
        inside = computed[:, :, block].repeat_interleave(selection.block_k, -1)[:, :, None, :kv_len]
        hidden = ~(inside & mask.dense(rows))
        logits = logits.masked_fill(hidden, -torch.inf)
        if sink is not None:
            logits = torch.cat([logits, sink.expand(batch, heads, q_len, 1)[:, :, rows]], -1)
        weights = logits.softmax(-1)[..., :kv_len]
        out[:, :, rows] = (weights.masked_fill(hidden, 0) @ values).to(q.dtype)
    return out


def blind_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blind: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    scalars: Sequence[int],
    logits: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """[B, H, q_len, dv]: softmax over all keys of ``logits`` (text of an expression in the product q.k, hidden keys'
    scores among them, computed in ``dtype``) in the rows of ``blind``, bool [B, H or 1, q_len, 1]; 0 where a row has no
    finite one. What other rows hold is not to be read. A few rows at a time; a device is waited for, except while its
    work is captured, when all rows are computed."""
    shape = batch, heads, q_len, kv_len = (*q.shape[:3], k.shape[2])
    out = ops.attention_output(q, v).zero_()
    captured = q.is_cuda and torch.cuda.is_current_stream_capturing()
    rows = torch.arange(q_len, device=q.device)
    rows = rows if captured else rows[blind[..., 0].any(1).any(0)]
    if not rows.numel() or not k.numel():
        return out
    score = scores.decode(logits)
    wide = torch.promote_types(dtype, torch.float32)
    keys, values = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    axes = [torch.arange(n, device=q.device).view([-1 if i == j else 1 for j in range(4)]) for i, n in enumerate(shape)]
    env = environment(shape, tensors, scalars) | dict(zip((B, H, Q, KV), axes))
    # What -inf is read as is no number of this dtype.
    env |= {n: math.copysign(math.inf, n) for n in score.expr.atoms(sympy.Number) if abs(n) > torch.finfo(wide).max}
    for some in rows.split(max(1, ELEMENTS // (batch * heads * kv_len))):
        product = (q[:, :, some].to(wide) @ keys.to(wide).transpose(-1, -2)).to(dtype).to(wide)
        weighed = score.apply(product, env | {Q: axes[2][:, :, some]}).to(dtype)
        empty = (weighed == -torch.inf).all(-1, keepdim=True)
        weights = weighed.to(wide).softmax(-1).masked_fill(empty, 0)
        out[:, :, some] = (weights @ values.to(wide)).to(q.dtype)
    return out
