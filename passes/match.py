"""Find every attention of a graph. The graph is untouched; each find is an ``AttentionSite`` or a ``Rejected`` with a typed reason.

A pattern is a file in ``patterns/`` with ``match(node)``; files are found by name and tried in alphabetical order. What holds for every
attention, whatever its spelling, is checked here: shapes, dtypes, gradients, and K/V that were repeated for grouped queries.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import fx

from stem_compile.passes import normalize
from stem_compile.passes.interpret import is_one
from stem_compile.sites import AttentionSite, Reason, Rejected, value

HEAD_DIMS = range(16, 257)
DECODE_QUERIES = 16
"""Fewer query rows than this behind a prefix are decoding, where selection has nothing to save."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def patterns() -> tuple[ModuleType, ...]:
    """Every pattern module, by name."""
    folder = Path(__file__).with_name("patterns")
    return tuple(importlib.import_module(f"stem_compile.passes.patterns.{m.name}") for m in pkgutil.iter_modules([str(folder)]))


def match(graph: fx.Graph) -> list[AttentionSite | Rejected]:
    """Attentions of ``graph`` in execution order."""
    found: list[AttentionSite | Rejected] = []
    for node in graph.nodes:
        for pattern in patterns():
            hit = pattern.match(node)
            if hit is not None:
                found.append(_checked(hit))
                break
    for index, hit in enumerate(found):
        if isinstance(hit, AttentionSite):
            hit.index = index
    return found


def _checked(hit: AttentionSite | Rejected) -> AttentionSite | Rejected:
    if isinstance(hit, Rejected):
        return hit
    tensors = [value(n) for n in (hit.q, hit.k, hit.v)]
    if not all(isinstance(t, torch.Tensor) and t.dim() == 4 for t in tensors):
        return Rejected(hit.node, Reason.SHAPE, "q, k, v are not 4-D: " + ", ".join(str(tuple(getattr(t, "shape", ()))) for t in tensors))
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return Rejected(hit.node, Reason.GRADIENT)
    q, k, v = tensors
    if not (q.dtype == k.dtype == v.dtype and q.dtype in DTYPES):
        return Rejected(hit.node, Reason.DTYPE, ", ".join(str(t.dtype).removeprefix("torch.") for t in tensors))
    if int(q.shape[-1]) not in HEAD_DIMS or int(v.shape[-1]) not in HEAD_DIMS:
        return Rejected(hit.node, Reason.HEAD_DIM, f"{q.shape[-1]} and {v.shape[-1]}")
    hit.k, hit.v = unrepeated(hit.k, hit.node), unrepeated(hit.v, hit.node)
    if value(hit.k).shape[1] != value(hit.v).shape[1]:
        hit.k, hit.v = _original(hit)
    q, k, v = value(hit.q), value(hit.k), value(hit.v)
    # int() of a symbolic size specialises it: nobody serves one model with several head counts or head dims.
    if int(q.shape[1]) % int(k.shape[1]):
        return Rejected(hit.node, Reason.SHAPE, f"{q.shape[1]} query heads over {k.shape[1]} key heads")
    # Comparing symbolic sizes installs guards: a cache's keys and values have lengths that Dynamo does not know to be equal.
    if not (q.shape[0] == k.shape[0] == v.shape[0] and q.shape[-1] == k.shape[-1] and k.shape[2] == v.shape[2]):
        return Rejected(hit.node, Reason.SHAPE, f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if q.shape[2] != k.shape[2] and q.shape[2] < DECODE_QUERIES:
        return Rejected(hit.node, Reason.DECODE, f"{q.shape[2]} queries, {k.shape[2]} keys")
    return hit


def _original(hit: AttentionSite) -> tuple[fx.Node, fx.Node]:
    op = normalize.read(hit.node)
    return (op["key"], op["value"]) if op is not None and op.name == "sdpa" else (hit.k, hit.v)


def unrepeated(node: fx.Node, site: fx.Node) -> fx.Node:
    """The [B, Hk, N, d] tensor behind ``x[:, :, None].expand(B, Hk, G, N, d).reshape(B, Hk * G, N, d)`` or its repeat_interleave; else ``node``."""
    op = normalize.read(node)
    if op is None or mutated_between(node, site):
        return node
    if op.name == "repeat_interleave" and isinstance(op["repeats"], int) and op["dim"] in (1, -3):
        return unrepeated(op["input"], site) if not mutated_between(op["input"], site) else node
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
    inserted = (source.name == "unsqueeze" and source["dim"] in (2, -3)) or (source.name == "getitem" and _inserts_group(source["index"]))
    base = source["input"]
    narrow = value(expand["input"])
    if not inserted or not is_one(narrow.shape[2]) or value(base).dim() != 4 or mutated_between(base, site):
        return node
    return base if str(tuple(value(base).shape[:2])) == str(tuple(wide.shape[:2])) else node


def _inserts_group(index: Any) -> bool:
    full = slice(None, None, None)
    parts = [p for p in index if p is not Ellipsis] if isinstance(index, tuple) else []
    return parts[:3] == [full, full, None] and all(p == full for p in parts[3:])


def mutated_between(node: fx.Node, site: fx.Node) -> bool:
    """Whether a value that may share ``node``'s memory is written between ``node`` and ``site``: then reading it later is not the same."""
    if not _writers(node.graph):
        return False
    aliases, frontier = {node}, [node]
    while frontier:
        current = frontier.pop()
        related = [n for n in (*current.users, *current.all_input_nodes) if n not in aliases and _may_alias(current, n)]
        aliases.update(related)
        frontier.extend(related)
    return any(node < writer < site for alias in aliases for writer in alias.users if normalize.mutates(writer) and writer.args and writer.args[0] is alias)


_seen: weakref.WeakKeyDictionary[fx.Graph, tuple[int, bool]] = weakref.WeakKeyDictionary()


def _writers(graph: fx.Graph) -> bool:
    """Whether anything in the graph writes in place. Asked for every tensor of every attention, so kept while the graph's size is the same."""
    size = len(graph.nodes)
    if _seen.get(graph, (-1, False))[0] != size:
        _seen[graph] = size, any(normalize.mutates(n) for n in graph.nodes)
    return _seen[graph][1]


_VIEWS = {
    "view", "reshape", "expand", "expand_as", "getitem", "unsqueeze", "squeeze", "transpose", "permute", "t", "detach", "alias", "flatten", "unflatten",
    "contiguous", "to", "type", "float", "half", "bool", "long", "int", "double", "type_as", "chunk", "split", "unbind", "narrow", "select", "view_as",
    "movedim", "mT", "T", "swapaxes", "index_select",
}  # fmt: skip


def _may_alias(a: fx.Node, b: fx.Node) -> bool:
    """Whether one of two neighbouring nodes may be a view of the other. A size, which views take beside their tensor, has no memory."""
    if any(isinstance(value(n), torch.SymInt | int | float | bool) for n in (a, b)):
        return False
    later = b if a in b.all_input_nodes else a
    return (normalize.spelling(later) or "") in _VIEWS or normalize.mutates(later)
