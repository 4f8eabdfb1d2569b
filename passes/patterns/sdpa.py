"""``torch.nn.functional.scaled_dot_product_attention``: one node in Dynamo's graph, however it was spelled."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from stem_compile.passes.graph import normalize
from stem_compile.passes.graph.sites import AttentionSite, Rejected
from stem_compile.passes.graph.values import value
from stem_compile.reasons import Reason


def match(node: fx.Node) -> AttentionSite | Rejected | None:
    """Site of an SDPA call, None for any other node."""
    if normalize.spelling(node) != "sdpa":
        return None
    op = normalize.read(node)
    if op is None:
        return Rejected(node, Reason.SHAPE, "arguments do not bind")
    q, k, v = op["query"], op["key"], op["value"]
    if op["dropout_p"] != 0.0:
        return Rejected(node, Reason.DROPOUT, f"dropout_p={op['dropout_p']}")
    scale = value(op["scale"]) if op["scale"] is not None else 1 / math.sqrt(value(q).shape[-1])
    if isinstance(scale, torch.SymFloat):
        # Under dynamic=True Dynamo passes a module's float attributes as inputs; reading one guards on its value.
        scale = float(scale)
    if not isinstance(scale, int | float):
        return Rejected(node, Reason.SHAPE, "scale is not a constant")
    return AttentionSite(node, q, k, v, float(scale), mask_node=op["attn_mask"], is_causal=bool(op["is_causal"]))


def _qkv(kv_heads: int = 4) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, h, 70, 16) for h in (4, kv_heads, kv_heads))


def examples() -> dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]]:
    """Name -> (function, inputs) that must match."""

    def masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(q.shape[2], device=q.device)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=rows[None, :] <= rows[:, None], scale=0.3)

    def biased(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias.masked_fill(rows[None, :] > rows[:, None], -torch.inf)
        )

    return {
        "is_causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), _qkv()),
        "positional": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, True), _qkv()),
        "enable_gqa": (
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
            _qkv(2),
        ),
        "mask built in the graph": (masked, _qkv()),
        "scores in the mask": (biased, (*_qkv(), torch.randn(1, 4, 70, 70))),
        "a mask from outside": (
            lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
            (*_qkv(), torch.ones(70, 70, dtype=torch.bool).tril()),
        ),
    }


def near_misses() -> dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], Reason]]:
    """Name -> (function, inputs, reason) that must be rejected, and why."""

    def window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(rows[None, :] - rows[:, None]).abs() < 9)

    return {
        "dropout": (
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=True),
            _qkv(),
            Reason.DROPOUT,
        ),
        "bidirectional": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v), _qkv(), Reason.BIDIRECTIONAL),
        "cross attention": (
            lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :60], v[:, :, :60]),
            _qkv(),
            Reason.CROSS_ATTENTION,
        ),
        "a mask of zeros": (
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(70, 70)),
            _qkv(),
            Reason.BIDIRECTIONAL,
        ),
        "a window on both sides": (window, _qkv(), Reason.BIDIRECTIONAL),
    }
