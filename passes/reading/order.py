"""Whether a mask that only positions make lets later queries see more: then budgets that fall with position mean
something."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from stem_compile.algebra import symbolic
from stem_compile.algebra.symbolic import KV, KV_LEN, Q_LEN, B, H, Q
from stem_compile.passes.reading.expressions import loads

TOKENS = 4096
"""Length at which masks of symbolic length are looked at."""
SAMPLES = 256


def runs_forward(predicate: Any, q_len: Any, kv_len: Any) -> bool:
    """Whether queries look back at least twice as far as they look ahead, and no query sees to the end from the first
    half: frames that are causal among each other do, a window on both sides does not.

    predicate: visible keys in ``B, H, Q, KV`` and lengths. One that reads tensors or other sizes says nothing.
    """
    if (
        predicate in (sympy.true, sympy.false)
        or loads(predicate)
        or predicate.free_symbols - {B, H, Q, KV, Q_LEN, KV_LEN}
    ):
        return False
    rows, keys = (n if isinstance(n, int) else TOKENS for n in (q_len, kv_len))
    before = max(keys - rows, 0)
    q = _sampled(rows)[:, None]
    kv = _sampled(keys)[None, :]
    env = {Q: q, KV: kv, Q_LEN: rows, KV_LEN: keys, B: 0, H: 0}
    visible = torch.as_tensor(symbolic.evaluate(predicate, env)).expand(q.shape[0], kv.shape[1])
    ahead = (kv - q - before)[visible]
    if not ahead.numel():
        return False
    forward, backward = int(ahead.max()), -int(ahead.min())
    return forward * 2 <= backward and forward < rows / 2


def _sampled(length: int) -> torch.Tensor:
    """All positions of a short length; of a long one, some of each part, near ones among them."""
    if length <= SAMPLES:
        return torch.arange(length)
    coarse = torch.linspace(0, length - 1, SAMPLES // 2).long()
    near: torch.Tensor = torch.cat([coarse, (coarse + torch.arange(len(coarse)) % 33).clamp(max=length - 1)])
    return torch.sort(near).values
