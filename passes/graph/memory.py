"""Who shares memory with whom, and who writes it: when a value may be read later than the graph reads it.

Dynamo's example values alias each other exactly as the tensors of a run do, so memory is that of their storage: no list
of operations that make views is needed, which would miss the next one.
"""

from __future__ import annotations

import functools
import inspect
import operator
import weakref
from typing import Any

import torch
from torch import fx

from stem_compile.passes.graph import normalize, schemas
from stem_compile.passes.graph.values import is_transformed, value

_IN_PLACE_OPERATORS = {
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "iand",
    "ior",
    "ixor",
    "ifloordiv",
    "imod",
    "ipow",
    "setitem",
    "delitem",
}
Memory = frozenset[int]


def memory(node: Any) -> Memory:
    """Storages of a node's tensors, one or several; empty for sizes and numbers."""
    known = value(node)
    parts = [_unwrapped(t) for t in (known if isinstance(known, tuple | list) else (known,))]
    return frozenset(
        t.untyped_storage()._cdata for t in parts if isinstance(t, torch.Tensor) and t.layout == torch.strided
    )


def _unwrapped(tensor: Any) -> Any:
    """The tensor that holds the memory: inside vmap and its kin the example value is a wrapper."""
    while is_transformed(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def written(node: fx.Node) -> list[fx.Node]:
    """What a node writes into: the target of in-place methods, operators and setitem, an ``out=``, the mutable
    arguments of a custom operator."""
    targets: list[Any] = []
    name, target = getattr(node.target, "__name__", ""), node.target
    if node.op == "call_method":
        name = str(target)
        if (
            (name.endswith("_") and not name.startswith("__"))
            or name == "__setitem__"
            or name.strip("_") in _IN_PLACE_OPERATORS
        ):
            targets.append(node.args[0])
    elif node.op == "call_function":
        if isinstance(target, torch._ops.OpOverload):
            targets += schemas.written_arguments((target._schema,), node.args, node.kwargs)
        elif isinstance(target, torch._ops.OpOverloadPacket):
            overloads = tuple(getattr(target, name)._schema for name in target.overloads())
            targets += schemas.written_arguments(overloads, node.args, node.kwargs)
        elif isinstance(target, torch._ops.HigherOrderOperator):
            # A user's Triton kernel may write whatever it is given.
            targets += node.all_input_nodes if "mutation" in name else []
        elif (
            name in _IN_PLACE_OPERATORS
            if getattr(operator, name, None) is target
            else name.endswith("_") and not name.startswith("_") and name.strip("_")
        ):
            targets.append(node.args[0])
        elif (flag := _inplace_flag(target)) is not None and (
            node.args[flag] if flag < len(node.args) else node.kwargs.get("inplace", False)
        ) is True:
            targets.append(node.args[0] if node.args else node.kwargs.get("input"))
    if node.op in ("call_function", "call_method") and isinstance(name, str):
        # Names alone miss some (``_foreach_zero_``, ``native_batch_norm``): torch's schemas say what is written.
        targets += schemas.written_arguments(schemas.overloads(name), node.args, dict(node.kwargs))
    targets.append(node.kwargs.get("out"))
    flat = [t for group in targets for t in (group if isinstance(group, tuple | list) else (group,))]
    return list(dict.fromkeys(t for t in flat if isinstance(t, fx.Node)))


@functools.cache
def _inplace_flag(function: Any) -> int | None:
    """Place of a parameter ``inplace``, as ``torch.nn.functional.relu`` has one."""
    try:
        return list(inspect.signature(function).parameters).index("inplace")
    except (TypeError, ValueError):
        return None


def all_written(graph: fx.Graph) -> Memory:
    """Memory that is written anywhere in a graph."""
    return frozenset(m for node in writers(graph) for target in written(node) for m in memory(target))


def mutates(node: fx.Node) -> bool:
    """Whether the node writes into something that it was given."""
    return bool(written(node))


def functional(node: Any) -> normalize.Op | None:
    """An in-place operation, or one with ``out=``, as the operation whose result it writes, where nothing else can see
    the memory it overwrites."""
    if not isinstance(node, fx.Node) or not mutates(node) or not overwrites_privately(node):
        return None
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    if node.kwargs.get("out") is not None:
        return normalize.named(name, node) if len(written(node)) == 1 else None
    name = name.strip("_")
    return normalize.named(name[1:] if name in _IN_PLACE_OPERATORS else name, node)


def overwrites_privately(writer: fx.Node) -> bool:
    """Whether what ``writer`` overwrites is memory that only it reads: fresh from an operation, seen through views at
    most."""
    targets = written(writer)
    return bool(targets) and all(_readers(t) <= {writer} and _is_private(t) for t in targets)


def is_fresh(node: fx.Node) -> bool:
    """Whether a node's memory is its own and nobody had it before."""
    return node.op in ("call_function", "call_method") and not any(
        memory(n) & memory(node) for n in node.all_input_nodes
    )


def _is_private(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    if mutates(node):
        return overwrites_privately(node)
    sources = [n for n in node.all_input_nodes if memory(n) & memory(node)]
    return all(_readers(n) <= {node} and _is_private(n) for n in sources)


def _readers(node: fx.Node) -> set[fx.Node]:
    """Users that read the node's elements, not its shape alone."""
    return {
        u
        for u in node.users
        if (spelled := normalize.spelling(u)) not in normalize.LIKE or ("_as" in str(spelled) and u.args[0] is node)
    }


def written_between(node: fx.Node, site: fx.Node, since: fx.Node | None = None) -> bool:
    """Whether the memory of ``node`` is written between ``since`` (the node itself, if not given) and ``site``: then
    reading it later is not the same."""
    places = writers(node.graph)
    if not places:
        return False
    own, start = memory(node), since or node
    return any(
        start < writer < site and any(memory(t) & own for t in written(writer)) and not overwrites_privately(writer)
        for writer in places
    )


_writes: weakref.WeakKeyDictionary[fx.Graph, dict[fx.Node, bool]] = weakref.WeakKeyDictionary()
_writers: weakref.WeakKeyDictionary[fx.Graph, tuple[int, list[fx.Node]]] = weakref.WeakKeyDictionary()


def writers(graph: fx.Graph) -> list[fx.Node]:
    """Nodes that write in place. Asked for every tensor of every attention, so kept while the graph's size is the same;
    a node says once whether it writes, since passes add and drop nodes but never turn one into another."""
    size = len(graph.nodes)
    if _writers.get(graph, (-1, []))[0] != size:
        known = _writes.setdefault(graph, {})
        known.update((n, mutates(n)) for n in graph.nodes if n not in known)
        _writers[graph] = size, [n for n in graph.nodes if known[n]]
    return _writers[graph][1]
