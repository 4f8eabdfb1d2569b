"""Follow a value back to the tensor it came from: through transposes, casts and merged heads, and behind keys repeated
for grouped queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from stem_compile.passes.graph import normalize
from stem_compile.passes.graph.memory import written_between
from stem_compile.passes.graph.values import View, value
from stem_compile.passes.reading.expressions import is_one

HALF = (torch.float16, torch.bfloat16)
CASTS = ("to", "float", "half", "bfloat16", "type", "type_as")


def peel(view: View, site: fx.Node, casts: bool = True) -> View:
    """The same value from further up the graph, with fewer steps where the graph already took their inverse.

    casts: drop those of half precision to float32, because the kernels compute in float32 anyway.
    """
    node, steps = view.node, list(view.steps)
    while (op := normalize.read(node)) is not None:
        inner = op.args.get("input")
        if not isinstance(inner, fx.Node) or not isinstance(value(inner), torch.Tensor) or written_between(inner, site):
            break
        widens = op.name in CASTS and value(inner).dtype in HALF and value(node).dtype == torch.float32
        if (casts and widens) or (op.name == "contiguous" and steps):
            node = inner
        elif steps and _undoes(op, node, inner, steps[0]):
            node = inner
            steps.pop(0)
        else:
            break
    return View(node, tuple(steps))


def _undoes(op: normalize.Op, node: fx.Node, inner: fx.Node, step: tuple[str, tuple[Any, ...]]) -> bool:
    """Whether ``step`` is the inverse of the view that made ``node`` of ``inner``."""
    name, arguments = step
    rank = value(node).dim()
    if name == "transpose" and arguments == (-1, -2):
        if op.name == "transpose":
            return {op["dim0"] % rank, op["dim1"] % rank} == {rank - 1, rank - 2}
        if op.name == "permute":
            return [d % rank for d in op["dims"]] == [*range(rank - 2), rank - 1, rank - 2]
        return op.name in ("mT",) or (op.name == "t" and rank == 2)
    if name == "permute" and op.name in ("permute", "transpose"):
        order = list(range(rank))
        if op.name == "transpose":
            a, b = op["dim0"] % rank, op["dim1"] % rank
            order[a], order[b] = b, a
        else:
            order = [d % rank for d in op["dims"]]
        return [order[d] for d in arguments[0]] == list(range(rank))
    if name == "unflatten" and op.name in ("reshape", "view", "flatten"):
        wide, narrow = value(inner), value(node)
        return bool(
            wide.dim() == 4
            and rank == 3
            and is_same(wide.shape[1], arguments[1][1])
            and all(is_same(a, b) for a, b in zip(wide.shape[2:], narrow.shape[1:]))
        )
    if name == "unsqueeze" and op.name == "squeeze":
        return bool(value(inner).dim() == rank + 1 and is_one(value(inner).shape[arguments[0]]))
    return False


def is_same(a: Any, b: Any) -> bool:
    """Whether two sizes are one number or one symbol; installs no guard."""
    return str(a) == str(b)


def unrepeated(node: fx.Node, site: fx.Node) -> fx.Node:
    """The [B, Hk, N, d] tensor behind ``x[:, :, None].expand(B, Hk, G, N, d).reshape(B, Hk * G, N, d)`` or its
    repeat_interleave; else ``node``."""
    op = normalize.read(node)
    if op is None or written_between(node, site):
        return node
    if op.name == "repeat_interleave" and isinstance(op["repeats"], int) and op["dim"] in (1, -3):
        return unrepeated(op["input"], site) if not written_between(op["input"], site) else node
    if op.name in ("contiguous", "clone"):
        inner = unrepeated(op["input"], site)
        return inner if inner is not op["input"] else node
    if op.name not in ("reshape", "view"):
        return node
    expand = normalize.read(op["input"])
    if expand is None or expand.name != "expand":
        return node
    source = normalize.read(expand["input"])
    wide, out = value(op["input"]), value(node)
    if source is None or wide.dim() != 5 or out.dim() != 4 or str(tuple(out.shape[2:])) != str(tuple(wide.shape[3:])):
        return node
    inserted = (source.name == "unsqueeze" and source["dim"] in (2, -3)) or (
        source.name == "getitem" and _inserts_group(source["index"])
    )
    base = source["input"]
    narrow = value(expand["input"])
    if not inserted or not is_one(narrow.shape[2]) or value(base).dim() != 4 or written_between(base, site):
        return node
    return base if str(tuple(value(base).shape[:2])) == str(tuple(wide.shape[:2])) else node


def _inserts_group(index: Any) -> bool:
    full = slice(None, None, None)
    parts = [p for p in index if p is not Ellipsis] if isinstance(index, tuple) else []
    return parts[:3] == [full, full, None] and all(p == full for p in parts[3:])
