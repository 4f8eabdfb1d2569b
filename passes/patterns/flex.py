"""``flex_attention`` whose ``mask_mod`` and ``score_mod`` the algebra can express: the two functions are read like any
other mask and score.

A block mask is taken to be that of its own ``mask_mod``, as ``create_block_mask`` makes it; one whose blocks say more
than its function is not supported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from stem_compile.passes.graph import normalize
from stem_compile.passes.graph.sites import AttentionSite, Mods, Rejected
from stem_compile.passes.graph.values import value
from stem_compile.reasons import Reason


def match(node: fx.Node) -> AttentionSite | Rejected | None:
    """Site of a flex_attention call, None for any other node."""
    op = normalize.read(node)
    if op is None or op.name != "flex_attention":
        return None
    results = {u.args[1]: u for u in node.users if normalize.spelling(u) == "getitem"}
    if 0 not in results or any(u.users for place, u in results.items() if place != 0):
        return Rejected(node, Reason.ESCAPES, "its log-sum-exp or maximum")
    q, scale = op["query"], value(op["scale"])
    if not isinstance(scale, int | float | torch.SymFloat | None):
        return Rejected(node, Reason.SHAPE, "scale is not a constant")
    modules = [_module(node, n) for n in (op["score_mod"], op["block_mask"][-1])]
    mods = Mods(modules[0], tuple(op["score_mod_other_buffers"]), modules[1], tuple(op["mask_mod_other_buffers"]))
    scale = 1 / math.sqrt(value(q).shape[-1]) if scale is None else float(scale)
    return AttentionSite(results[0], q, op["key"], op["value"], scale, mods=mods)


def _module(node: fx.Node, function: Any) -> fx.GraphModule | None:
    owner = node.graph.owning_module
    module = (
        owner.get_submodule(str(function.target))
        if isinstance(function, fx.Node) and function.op == "get_attr" and owner is not None
        else None
    )
    return module if isinstance(module, fx.GraphModule) else None


def _qkv(heads: int = 2) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(1, h, 128, 16) for h in (4, heads, heads))


def examples() -> dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]]:
    """Name -> (function, inputs) that must match."""
    ids = torch.arange(128)[None, :] // 50

    def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q >= k

    def packed(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q >= k) & (ids[b, q] == ids[b, k])

    def capped(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return 20 * torch.tanh(s / 20) + 0.1 * (k - q)

    masks = {m: create_block_mask(m, None, None, 128, 128, device="cpu") for m in (causal, packed)}
    return {
        "causal": (lambda q, k, v: flex_attention(q, k, v, block_mask=masks[causal], enable_gqa=True), _qkv()),
        "documents": (lambda q, k, v: flex_attention(q, k, v, block_mask=masks[packed], scale=0.2), _qkv(4)),
        "score_mod": (lambda q, k, v: flex_attention(q, k, v, score_mod=capped, block_mask=masks[causal]), _qkv(4)),
    }


def near_misses() -> dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], Reason]]:
    """Name -> (function, inputs, reason) that must be rejected, and why."""

    def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q >= k

    def strange(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s + torch.sin(q * 1.0)

    mask = create_block_mask(causal, None, None, 128, 128, device="cpu")
    return {
        "no mask": (lambda q, k, v: flex_attention(q, k, v), _qkv(4), Reason.BIDIRECTIONAL),
        "an unread score_mod": (
            lambda q, k, v: flex_attention(q, k, v, score_mod=strange, block_mask=mask),
            _qkv(4),
            Reason.MASK,
        ),
        "log-sum-exp used": (
            lambda q, k, v: flex_attention(q, k, v, block_mask=mask, return_lse=True),
            _qkv(4),
            Reason.ESCAPES,
        ),
    }
