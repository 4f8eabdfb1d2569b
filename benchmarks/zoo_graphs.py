"""Attention written out by hand in a captured graph, found independently of the backend's patterns: a softmax between
two products.

This is what recognition is held against, so it is deliberately simple and generous: from a softmax up to a product and
down to a product, through anything that works elementwise or only moves elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from stem_compile.passes.graph.normalize import spelling
from stem_compile.passes.graph.values import module_path, value

PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum", "mm", "addbmm"}
_PASSED = """
add sub mul truediv div neg where masked_fill masked_fill_ tanh to type type_as float half double bfloat16 view
reshape transpose permute unsqueeze squeeze
expand expand_as cat getitem contiguous clamp clip minimum maximum dropout flatten unflatten clone detach nan_to_num
max amax getattr iadd isub imul
itruediv add_ sub_ mul_ div_ swapaxes stack exp log relu sigmoid softplus narrow split chunk repeat_interleave
index_fill pad alias view_as setitem copy_
scatter index_put abs pow sqrt
"""
PASSED = set(_PASSED.split())
LONGEST = 60
"""Nodes between the products beyond which a chain is no attention."""


@dataclass
class Chain:
    """nodes: first product to last product in execution order. signature: the ops alone, equal for equal spellings.
    listing: one line a node."""

    nodes: list[fx.Node]
    softmax: fx.Node
    signature: str
    listing: str
    name: str


def handwritten(graph: fx.Graph) -> list[Chain]:
    """Chains product -> softmax -> product of ``graph``, one a softmax."""
    chains = []
    for node in graph.nodes:
        if name_of(node) != "softmax":
            continue
        above = _walk(node, lambda n: n.all_input_nodes)
        below = _walk(node, lambda n: n.users)
        if not (any(name_of(n) in PRODUCTS for n in above) and any(name_of(n) in PRODUCTS for n in below)):
            continue
        nodes = _between(node, above, below, graph)
        chains.append(
            Chain(
                nodes,
                node,
                " -> ".join(_word(n, set(nodes)) for n in nodes),
                "\n".join(_line(n) for n in nodes),
                module_path(node),
            )
        )
    return chains


def name_of(node: fx.Node) -> str:
    return spelling(node) or str(getattr(node.target, "__name__", node.target))


def _walk(start: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """Nodes reached from ``start`` through ops that pass elements on; products are reached, not passed."""
    visited: set[fx.Node] = set()
    frontier = [start]
    while frontier and len(visited) < 4 * LONGEST:
        for node in step(frontier.pop()):
            known = value(node)
            if node in visited or node.op not in ("call_function", "call_method"):
                continue
            if isinstance(known, torch.Tensor) and not known.is_floating_point():
                continue
            name = name_of(node)
            if name in PRODUCTS:
                visited.add(node)
            elif name in PASSED:
                visited.add(node)
                frontier.append(node)
    return visited


def _between(softmax: fx.Node, above: set[fx.Node], below: set[fx.Node], graph: fx.Graph) -> list[fx.Node]:
    """Of the nodes above those that a product feeds, of those below those that feed a product."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    fed: set[fx.Node] = {n for n in above if name_of(n) in PRODUCTS}
    for node in sorted(above, key=order.__getitem__):
        if any(i in fed for i in node.all_input_nodes):
            fed.add(node)
    feeding: set[fx.Node] = {n for n in below if name_of(n) in PRODUCTS}
    for node in sorted(below, key=order.__getitem__, reverse=True):
        if any(u in feeding for u in node.users):
            feeding.add(node)
    return sorted(fed | feeding | {softmax}, key=order.__getitem__)


def _kind(node: fx.Node) -> str:
    known = value(node)
    if isinstance(known, torch.Tensor):
        return f"{str(known.dtype).removeprefix('torch.')}{known.dim()}d"
    return type(known).__name__


def _word(node: fx.Node, inside: set[fx.Node]) -> str:
    """One op with what enters it from the side: tensors by dtype and rank, small constants as they are."""
    parts = []
    for a in (*node.args, *node.kwargs.values()):
        if isinstance(a, fx.Node):
            parts.append("." if a in inside else _kind(a))
        elif isinstance(a, list | tuple) and any(isinstance(x, fx.Node) for x in a):
            parts.append(
                "[" + ", ".join(("." if x in inside else _kind(x)) if isinstance(x, fx.Node) else "_" for x in a) + "]"
            )
        elif isinstance(a, float):
            parts.append("c" if abs(a) < 1e9 else "-big" if a < 0 else "big")
        elif isinstance(a, str | torch.dtype | bool):
            parts.append(str(a).removeprefix("torch."))
    name = name_of(node)
    return f"{name}({', '.join(parts)})" if name not in ("getitem", "view", "reshape", "transpose", "permute") else name


def _line(node: fx.Node) -> str:
    known = value(node)
    shape = f"{str(known.dtype).removeprefix('torch.')}{list(known.shape)}" if isinstance(known, torch.Tensor) else ""

    def show(a: fx.Node) -> str:
        other = value(a)
        return f"{a.name}:{list(other.shape)}" if isinstance(other, torch.Tensor) else a.name

    args = ", ".join(fx.node.map_arg(a, lambda n: _Named(show(n))).__repr__() for a in node.args)
    keywords = "".join(f", {k}={fx.node.map_arg(v, lambda n: _Named(show(n)))!r}" for k, v in node.kwargs.items())
    return f"{node.name} = {name_of(node)}({args}{keywords})  # {shape}"


class _Named(str):
    def __repr__(self) -> str:
        return str(self)
