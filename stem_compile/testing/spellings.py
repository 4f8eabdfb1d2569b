"""One attention, written in the ways that models write it: for tests that a rewrite must not depend on spelling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Spelling:
    """A way to write causal attention of q [B, H, N, d] over k, v [B, Hk, N, d]: call it like a function. name: key of
    ``WAYS``."""

    name: str

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return WAYS[self.name](q, k, v)


def _repeated(x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    batch, heads, length, width = x.shape
    return (
        x[:, :, None].expand(batch, heads, q.shape[1] // heads, length, width).reshape(batch, q.shape[1], length, width)
    )


def _triangle(q: torch.Tensor) -> torch.Tensor:
    n = torch.arange(q.shape[2], device=q.device)
    return n[None, :] <= n[:, None]


def _is_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def _positional(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, _repeated(k, q), _repeated(v, q), None, 0.0, True)


def _interleaved(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(
        q, k.repeat_interleave(group, 1), v.repeat_interleave(group, dim=1), is_causal=True
    )


def _compared(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, _repeated(k, q), _repeated(v, q), attn_mask=_triangle(q)[None, None])


def _tril(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    ones = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
    return F.scaled_dot_product_attention(
        q, _repeated(k, q), _repeated(v, q), attn_mask=ones.tril(), scale=1 / math.sqrt(q.shape[-1])
    )


def _negated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    ones = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
    return F.scaled_dot_product_attention(q, _repeated(k, q), _repeated(v, q), attn_mask=~torch.triu(ones, diagonal=1))


WAYS: dict[str, Attention] = {
    "is_causal and enable_gqa": _is_causal,
    "positional arguments": _positional,
    "repeat_interleave": _interleaved,
    "mask from compared positions": _compared,
    "mask from tril": _tril,
    "mask from negated triu": _negated,
}


def spellings() -> st.SearchStrategy[Spelling]:
    """One of the ways, as a record."""
    return st.sampled_from(sorted(WAYS)).map(Spelling)
