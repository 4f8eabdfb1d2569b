"""Fused attention of ``torch.nn`` that was not written out (``expand.py``): it stays, and says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from stem_compile.passes import expand
from stem_compile.passes.graph import normalize
from stem_compile.passes.graph.sites import AttentionSite, Rejected
from stem_compile.reasons import Reason


def match(node: fx.Node) -> AttentionSite | Rejected | None:
    """Rejection of a fused attention, None for any other node."""
    a = expand.bound(node)
    if a is None:
        return (
            Rejected(node, Reason.BIDIRECTIONAL, "fused")
            if normalize.spelling(node) == "_native_multi_head_attention"
            else None
        )
    if "embed_dim_to_check" not in a:
        return Rejected(node, Reason.BIDIRECTIONAL if a["mask"] is None else Reason.SHAPE, "a fused encoder layer")
    if a["attn_mask"] is None and not a["is_causal"]:
        return Rejected(
            node, Reason.BIDIRECTIONAL if a["query"] is a["key"] else Reason.CROSS_ATTENTION, "nn.MultiheadAttention"
        )
    if a["training"] and a["dropout_p"]:
        return Rejected(node, Reason.DROPOUT, f"p={a['dropout_p']}")
    used = any(normalize.spelling(u) != "getitem" or u.args[1] != 0 for u in node.users)
    return Rejected(node, Reason.ESCAPES if used else Reason.SHAPE, "nn.MultiheadAttention")


def _module(**options: Any) -> tuple[torch.nn.MultiheadAttention, torch.Tensor]:
    torch.manual_seed(0)
    return torch.nn.MultiheadAttention(64, 4, batch_first=True, **options).eval().requires_grad_(False), torch.randn(
        2, 70, 64
    )


def examples() -> dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]]:
    """Name -> (function, inputs) that must match."""
    module, x = _module()
    layers = {
        first: torch.nn.TransformerEncoderLayer(64, 4, 96, batch_first=True, norm_first=first, activation=activation)
        .eval()
        .requires_grad_(False)
        for first, activation in ((False, "relu"), (True, "gelu"))
    }
    hidden = torch.ones(70, 70, dtype=torch.bool).triu(1)
    late = torch.arange(70).expand(2, -1) >= torch.tensor([[70], [50]])
    return {
        "a Boolean mask": (
            lambda x: module(x, x, x, attn_mask=torch.ones(70, 70, dtype=torch.bool).triu(1), need_weights=False)[0],
            (x,),
        ),
        "weights computed, not used": (
            lambda x: module(x, x, x, attn_mask=torch.full((70, 70), -torch.inf).triu(1))[0],
            (x,),
        ),
        "key padding": (
            lambda x, m, p: module(x, x, x, attn_mask=m, key_padding_mask=p, need_weights=False)[0],
            (x, hidden, late),
        ),
        "is_causal": (lambda x, m: module(x, x, x, attn_mask=m, is_causal=True, need_weights=False)[0], (x, hidden)),
        "encoder layer": (lambda x: layers[False](x, src_mask=torch.full((70, 70), -torch.inf).triu(1)), (x,)),
        "encoder layer, norm first": (
            lambda x: layers[True](x, src_mask=torch.full((70, 70), -torch.inf).triu(1)),
            (x,),
        ),
    }


def near_misses() -> dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], Reason]]:
    """Name -> (function, inputs, reason) that must be rejected, and why."""
    module, x = _module()
    layer = torch.nn.TransformerEncoderLayer(64, 4, 96, batch_first=True).eval().requires_grad_(False)
    return {
        "no mask": (lambda x: module(x, x, x, need_weights=False)[0], (x,), Reason.BIDIRECTIONAL),
        "weights used": (
            lambda x: module(x, x, x, attn_mask=torch.full((70, 70), -torch.inf).triu(1)),
            (x,),
            Reason.ESCAPES,
        ),
        "cross attention": (
            lambda x, y: module(x, y, y, need_weights=False)[0],
            (x, torch.randn(2, 30, 64)),
            Reason.CROSS_ATTENTION,
        ),
        "an encoder": (lambda x: layer(x), (x,), Reason.BIDIRECTIONAL),
    }
