"""Rows that see no key and whose hidden scores are finite and differ: what a softmax over them gives, in plain torch on
every device. ``average_blind.py`` puts it in these rows' place."""

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
