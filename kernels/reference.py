"""The oracle: block-sparse attention in plain torch, one query block at a time, exact in fp64.

It defines what every kernel must compute: softmax over exactly the visible keys of the selected blocks, with the scores
modified and the sink joined where the attention has them; a row without any visible key gives 0. (What a softmax over
hidden scores gives it instead is added behind the operator, by ``average_blind.py``, the same for all kernels; where
that is no mean, ``blind_attention`` computes it.)
"""

from __future__ import annotations

import torch

from stem_compile import ops
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
