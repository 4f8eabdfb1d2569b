"""Rows of a mask that see no key: whether there can be any, and which.

A sparse attention gives 0 for them. Attention written out with a finite score for hidden keys gives the mean of all
values instead, because a softmax over equal scores is even; ``average_blind.py`` adds that where it is what the
graph says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch

from stem_compile.algebra import symbolic
from stem_compile.algebra.blocks import Shape, key_visible, split
from stem_compile.algebra.masks import Mask, environment
from stem_compile.algebra.symbolic import KV, KV_LEN, B, H, Q

ELEMENTS = 1 << 22
"""Scores looked at in one piece, where a mask has no closed form."""


def can_be_blind(predicate: Any, before: Any) -> bool:
    """Whether a row may see no key, as far as the predicate alone tells. before: keys before the first query, kv_len -
    q_len, as an expression.

    A row surely sees one if it always sees key 0, the key of its own number, or the one that stands where it stands
    counted from the end.
    """
    witnesses = [sympy.Integer(0), *((Q, Q + before) if sympy.sympify(before).is_nonnegative else ())]
    return not any(_holds(sympy.sympify(predicate).xreplace({KV: key})) for key in witnesses)


def _holds(predicate: Any) -> bool:
    """Whether a predicate is true whatever its loads are."""
    loads = {
        f: sympy.Dummy(real=True)
        for f in predicate.atoms(sympy.core.function.AppliedUndef)
        if symbolic.load_index(f) is not None
    }
    return bool(predicate.xreplace(loads) == sympy.true)


def blind_rows(
    mask: Mask, shape: Shape, tensors: Sequence[torch.Tensor], scalars: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Bool [B, H, q_len, 1], H = 1 where the mask is the same for all heads: rows to which no key is visible. Memory
    grows with the length, not its square."""
    parts = split(mask)
    heads = shape[1] if H in mask.predicate.free_symbols else 1
    if parts.others or not all(band.is_interval for band in parts.bands):
        sighted = _looked_up(mask, (shape[0], heads, *shape[2:]), tensors, scalars, device)
    else:
        sighted = _between(mask, shape, tensors, scalars, device)[:, None]
    return ~sighted.expand(shape[0], heads, shape[2])[..., None]


def _between(
    mask: Mask, shape: Shape, tensors: Sequence[torch.Tensor], scalars: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Bool [B or 1, q_len]: whether the last visible key up to a row's near edge lies within its far edge."""
    causal, bands, _, _ = parts = split(mask)
    env = environment(shape, tensors, scalars)
    env |= {B: torch.arange(shape[0], device=device)[:, None], Q: torch.arange(shape[2], device=device)[None, :]}
    ends = [
        KV_LEN - 1,
        *([Q + causal] if causal is not None else []),
        *(band.near for band in bands if band.near is not None),
    ]
    low, high = (
        symbolic.as_tensor(symbolic.evaluate(sympy.sympify(e), env), device) for e in (parts.far or 0, sympy.Min(*ends))
    )
    high = high.expand(-1, shape[2]) if high.dim() else high.expand(1, shape[2])
    visible = key_visible(mask, shape, tensors, scalars, device)
    if visible is not None:
        last = torch.where(visible, torch.arange(shape[3], device=device), -1).cummax(-1).values
        rows = max(len(last), len(high))
        high = torch.where(high < 0, -1, last.expand(rows, -1).gather(-1, high.expand(rows, -1).clamp(min=0)))
    return high >= low.clamp(min=0)


def _looked_up(
    mask: Mask, shape: Shape, tensors: Sequence[torch.Tensor], scalars: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Bool [B, H, q_len] by looking at every key, at a few rows in a piece."""
    batch, heads, q_len, kv_len = shape
    sighted = _own_key(mask, shape, tensors, scalars, device).expand(batch, heads, q_len).clone()
    # On a CPU most rows are done by now; on a device, asking which would wait for it.
    rows = (~sighted).any(1).any(0).nonzero()[:, 0] if device.type == "cpu" else torch.arange(q_len, device=device)
    for some in rows.split(max(1, ELEMENTS // (batch * heads * kv_len))):
        sighted[:, :, some] |= mask.dense(shape, tensors, scalars, device, some).any(-1)
    return sighted


def _own_key(
    mask: Mask, shape: Shape, tensors: Sequence[torch.Tensor], scalars: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Bool, broadcastable to [B, H, q_len]: whether a row sees the key that stands where it stands, counted from the
    end."""
    axes = [
        torch.arange(n, device=device).view([-1 if i == j else 1 for j in range(3)]) for i, n in enumerate(shape[:3])
    ]
    key = axes[2] + shape[3] - shape[2]
    env = environment(shape, tensors, scalars) | dict(zip((B, H, Q), axes)) | {KV: key.clamp(min=0)}
    return symbolic.as_tensor(symbolic.evaluate(mask.predicate, env), device) & (key >= 0)
