"""Example values of an FX graph's nodes, nodes seen through views, and where in the model a node was called."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True)
class View:
    """A graph value seen another way: method calls applied in order once the attention is rewritten. ``view`` makes the
    plain ones nodes again."""

    node: fx.Node
    steps: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def apply(self, x: Any) -> Any:
        """The steps on an example value."""
        for name, arguments in self.steps:
            x = getattr(x, name)(*arguments)
        return x

    def emit(self, graph: fx.Graph) -> fx.Node:
        """Insert the steps at the graph's current place; the node that holds the result."""
        node, x = self.node, value(self.node)
        for name, arguments in self.steps:
            node = graph.call_method(name, (node, *arguments))
            with _fake_mode(x):
                x = getattr(x, name)(*arguments)
            node.meta["example_value"] = x
        return node


def _fake_mode(x: Any) -> Any:
    return x.fake_mode if hasattr(x, "fake_mode") else contextlib.nullcontext()


def module_path(node: fx.Node) -> str:
    """Where in the model a node was called: ``model.layers.0.self_attn``; the node's own name where Dynamo recorded
    nothing."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = str(list(stack.values())[-1][0])
    for noise in ("L['self'].", "L['self']", "L['fn'].", "L['model'].", "._modules"):
        path = path.replace(noise, "")
    return path.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "").strip(".") or node.name


def value(node: Any) -> Any:
    """The example value Dynamo recorded for a node (fake tensor, SymInt or number), or of a view of one; other things
    are their own value."""
    if isinstance(node, View):
        with _fake_mode(value(node.node)):
            return node.apply(value(node.node))
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else node
