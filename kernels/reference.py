"""The oracle: block-sparse attention in plain torch, one query block at a time, exact in fp64.

It defines what every kernel must compute: softmax over exactly the visible keys of the selected blocks, with the scores
modified and the sink joined where the attention has them; a row without any visible key gives 0. (What a softmax over
equal hidden scores gives it instead is added behind the operator, by ``average_blind.py``, the same for all
kernels.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stem_compile import ops
from stem_compile.algebra.blocks import candidates
from stem_compile.algebra.masks import Mask, environment
from stem_compile.algebra.scores import Score
from stem_compile.algebra.symbolic import KV, B, H, Q
from stem_compile.selection import BlockSelection


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    chosen: BlockSelection,
    mask: Mask,
    tensors: Sequence[torch.Tensor],
    scalars: Sequence[int],
    scale: float,
    score: Score | None = None,
) -> torch.Tensor:
    """q: [B, H, q_len, d]; k: [B, Hk, kv_len, d]; v: [B, Hk, kv_len, dv] -> [B, H, q_len, dv] in q's dtype, computed in
    at least fp32.

    chosen: key blocks a query block; mask, tensors, scalars: which of their scores are visible; scale: factor of q.k
    before ``score`` and the softmax.
    """
    batch, heads, q_len, _ = q.shape
    key_heads, kv_len = k.shape[1:3]
    shape = (batch, heads, q_len, kv_len)
    dtype = torch.promote_types(q.dtype, torch.float32)
    dense = chosen.dense(candidates(mask, shape, tensors, scalars, chosen.block_q, chosen.block_k, q.device))
    out = ops.attention_output(q, v)
    keys, values = (x.to(dtype).repeat_interleave(heads // key_heads, 1) for x in (k, v))
    score = score or Score()
    sink = score.sink_logits(shape, tensors, scalars, keys)
    axes = [torch.arange(n, device=q.device).view([-1 if i == j else 1 for j in range(4)]) for i, n in enumerate(shape)]
    env = environment(shape, [t.to(dtype) if t.is_floating_point() else t for t in tensors], scalars) | dict(
        zip((B, H, Q, KV), axes)
    )
    for block, start in enumerate(range(0, q_len, chosen.block_q)):
        rows = slice(start, min(start + chosen.block_q, q_len))
        scores = score.apply(q[:, :, rows].to(dtype) @ keys.transpose(-1, -2) * scale, env | {Q: axes[2][:, :, rows]})
        computed = dense[:, :, block].repeat_interleave(chosen.block_k, -1)[:, :, None, :kv_len]
        hidden = ~(computed & mask.dense(shape, tensors, scalars, q.device, rows))
        scores = scores.masked_fill(hidden, -torch.inf)
        if sink is not None:
            scores = torch.cat([scores, sink.expand(batch, heads, q_len, 1)[:, :, rows]], -1)
        weights = scores.softmax(-1)[..., :kv_len]
        out[:, :, rows] = (weights.masked_fill(hidden, 0) @ values).to(q.dtype)
    return out
