"""Block geometry of one attention: block counts, which keys a padding hides, which block pairs hold a visible score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch

from stem_compile import symbolic
from stem_compile.masks import And, Causal, Full, Mask, environment
from stem_compile.symbolic import KV, B, H, Q

Shape = tuple[int, int, int, int]
"""(batch, query heads, q_len, kv_len)."""


def cdiv(a: Any, b: int) -> Any:
    """Ceiling of a / b for ints and SymInts."""
    return (a + b - 1) // b


def split(mask: Mask) -> tuple[Causal | None, list[Mask], list[Mask]]:
    """(the causal term or None, terms that look at keys only, all other terms) of a conjunction."""
    causal: Causal | None = None
    keys: list[Mask] = []
    others: list[Mask] = []
    for term in mask.terms if isinstance(mask, And) else (mask,):
        if isinstance(term, Causal) and causal is None:
            causal = term
        elif isinstance(term, Full):
            continue
        elif not {Q, H} & term.predicate.free_symbols:
            keys.append(term)
        else:
            others.append(term)
    return causal, keys, others


def causal_offset(mask: Mask, shape: Shape, scalars: Sequence[int] = ()) -> int | None:
    """Number of keys before the first query row under ``mask``'s causal term; None without one."""
    causal, _, _ = split(mask)
    return None if causal is None else int(symbolic.evaluate(sympy.sympify(causal.offset), environment(shape, (), scalars)))


def key_visible(mask: Mask, shape: Shape, tensors: Sequence[torch.Tensor], scalars: Sequence[int], device: torch.device) -> torch.Tensor | None:
    """Bool [B or 1, kv_len]: keys that the key-only terms leave visible; None when there are no such terms."""
    _, keys, _ = split(mask)
    if not keys:
        return None
    env = environment(shape, tensors, scalars)
    env |= {B: torch.arange(shape[0], device=device)[:, None], KV: torch.arange(shape[3], device=device)[None, :]}
    return torch.as_tensor(symbolic.evaluate(sympy.And(*(t.predicate for t in keys)), env), device=device).expand(-1, shape[3])


def first_visible(visible: torch.Tensor | None, kv_len: int, block_k: int, device: torch.device) -> torch.Tensor:
    """int32 [B or 1, key blocks]: position of each block's first visible key, kv_len where the block has none."""
    blocks = cdiv(kv_len, block_k)
    position = torch.arange(blocks * block_k, device=device, dtype=torch.int32)
    if visible is None:
        return position[None, ::block_k].contiguous()
    padded = torch.nn.functional.pad(visible, (0, blocks * block_k - kv_len))
    return torch.where(padded, position, kv_len).view(len(visible), blocks, block_k).amin(-1)


def candidates(
    mask: Mask, shape: Shape, tensors: Sequence[torch.Tensor], scalars: Sequence[int], block_q: int, block_k: int, device: torch.device | str
) -> torch.Tensor:
    """Bool [B or 1, H or 1, query blocks, key blocks]: pairs with at least one visible score. Exact; O(kv_len) memory for causal & padding."""
    device = torch.device(device)
    q_len, kv_len = shape[2:]
    rows = cdiv(q_len, block_q)
    causal, _, others = split(mask)
    if others:
        return _candidates_by_row(mask, shape, tensors, scalars, block_q, block_k, device)
    first = first_visible(key_visible(mask, shape, tensors, scalars, device), kv_len, block_k, device)[:, None, None, :]
    if causal is None:
        return (first < kv_len).expand(-1, -1, rows, -1)
    offset = causal_offset(mask, shape, scalars) or 0
    last = (torch.arange(1, rows + 1, device=device) * block_q).clamp(max=q_len) - 1 + offset
    return (first <= last[None, None, :, None]) & (first < kv_len)


def _candidates_by_row(mask: Mask, shape: Shape, tensors: Any, scalars: Any, block_q: int, block_k: int, device: torch.device) -> torch.Tensor:
    q_len, kv_len = shape[2:]
    columns = cdiv(kv_len, block_k)
    found = []
    for start in range(0, q_len, block_q):
        seen = mask.dense(shape, tensors, scalars, device, rows=slice(start, start + block_q)).any(2)
        seen = torch.nn.functional.pad(seen.expand(*seen.shape[:-1], kv_len), (0, columns * block_k - kv_len))
        found.append(seen.unflatten(-1, (columns, block_k)).any(-1))
    return torch.stack(found, 2)
