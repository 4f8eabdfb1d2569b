"""A softmax over keys, however it is spelled, and the logits that it is of."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from stem_compile.passes.graph import normalize
from stem_compile.passes.graph.memory import functional
from stem_compile.passes.graph.values import value

RESHAPING = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze")
_CASTS = ("to", "type", "float", "contiguous", "type_as", "double")


def normalized(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(x, dim from the end) where ``node`` is softmax(x, dim): the function, ``exp(x) / exp(x).sum(dim)``,
    ``exp(x - logsumexp(x))`` or ``exp(log_softmax(x))``; None for any other node."""
    op = normalize.read(node) or functional(node)
    if op is None or not isinstance(value(node), torch.Tensor):
        return None
    if op.name == "softmax":
        return _of(op["input"], op["dim"])
    if op.name == "truediv" and op["rounding_mode"] is None:
        exponential, total = _uncast(op["input"]), normalize.read(op["other"])
        inner = normalize.read(exponential)
        if inner is not None and inner.name == "exp" and total is not None and total.name == "sum":
            whole = _uncast(total["input"]) is exponential and total["keepdim"] is True
            return _of(inner["input"], _single(total["dim"])) if whole else None
    if op.name == "exp":
        inner = normalize.read(op["input"])
        if inner is not None and inner.name == "log_softmax":
            return _of(inner["input"], inner["dim"])
        if inner is not None and inner.name == "sub" and inner["alpha"] == 1:
            total = normalize.read(inner["other"])
            if (
                total is not None
                and total.name == "logsumexp"
                and total["input"] is inner["input"]
                and total["keepdim"]
            ):
                return _of(inner["input"], _single(total["dim"]))
    return None


def _of(logits: Any, dim: Any) -> tuple[fx.Node, int] | None:
    if not isinstance(logits, fx.Node) or not isinstance(dim, int):
        return None
    rank = value(logits).dim()
    return (logits, dim % rank - rank) if rank else None


def _single(dim: Any) -> Any:
    return dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim


def _uncast(node: Any) -> Any:
    while (op := normalize.read(node)) is not None and op.name in _CASTS:
        node = op["input"]
    return node


def unshifted(logits: fx.Node) -> fx.Node:
    """Logits without what a softmax does not see: casts, the subtraction of each row's maximum, heads merged into the
    batch."""
    while (op := normalize.read(logits)) is not None:
        cast = op.name in _CASTS and isinstance(op["input"], fx.Node)
        shift = op.name == "sub" and _is_peak(op["other"], op["input"])
        merge = (
            op.name in RESHAPING
            and value(logits).dim() == 3
            and value(op["input"]).dim() == 4
            and keeps_scores(op["input"], logits)
        )
        if not (cast or shift or merge):
            break
        logits = op["input"]
    return logits


def keeps_scores(before: fx.Node, after: fx.Node) -> bool:
    """Whether a view leaves the last two dimensions, queries and keys, alone."""
    return str(tuple(value(before).shape[-2:])) == str(tuple(value(after).shape[-2:]))


def _is_peak(node: Any, of: Any) -> bool:
    """Whether ``node`` is the maximum of ``of`` over its last dimension, kept as a dimension."""
    while isinstance(node, fx.Node) and (
        getattr(node.target, "__name__", "") in ("getitem", "getattr")
        or normalize.spelling(node) in ("detach", "contiguous")
    ):
        node = node.args[0]
    op = normalize.read(node)
    return (
        op is not None
        and op.name in ("max", "amax")
        and op["input"] is of
        and _single(op["dim"]) == -1
        and bool(op["keepdim"])
    )
