"""Example values of an FX graph's nodes, nodes seen through views, and where in the model a node was called."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

Steps = tuple[tuple[str, tuple[Any, ...]], ...]
"""Method calls, in order. Arguments may be nodes of the graph: sizes that only a run knows."""


@dataclass(frozen=True)
class View:
    """A graph value seen another way: method calls in order, which become nodes by ``emit`` once the attention is
    rewritten. Without steps it is the node itself."""

    node: fx.Node
    steps: Steps = ()

    def apply(self, x: Any, known: Callable[[fx.Node], Any] | None = None) -> Any:
        """The steps on a value. known: what the nodes among their arguments are; None takes their example values."""
        for name, arguments in self.steps:
            x = getattr(x, name)(*fx.node.map_arg(arguments, known or value))
        return x

    def emit(self, graph: fx.Graph) -> fx.Node:
        """Insert the steps at the graph's current place; the node that holds the result."""
        node, x = self.node, value(self.node)
        for name, arguments in self.steps:
            node = graph.call_method(name, (node, *arguments))
            with _fake_mode(x):
                x = getattr(x, name)(*fx.node.map_arg(arguments, value))
            node.meta["example_value"] = x
        return node


def _fake_mode(x: Any) -> Any:
    return x.fake_mode if hasattr(x, "fake_mode") else contextlib.nullcontext()


def module_path(node: fx.Node) -> str:
    """Where in the model a node was called: ``model.layers.0.self_attn``; the node's own name where Dynamo recorded
    nothing.

    Dynamo writes the path as source text whose root differs from version to version: ``L['self']._modules['layers']``,
    ``L['fn'].layers[0]``, ``L.args.0.layers``. The root is everything up to the frame's local, told by its form.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = re.sub(r"\[['\"]?(.*?)['\"]?\]", r".\1", str(list(stack.values())[-1][0]))
    parts = [p for p in path.split(".") if p and p not in _STORES]
    if parts[:1] in (["L"], ["G"]):
        # A local of the frame, or one of the arguments that a wrapper takes as a whole: *args, **kwargs.
        gathered = parts[1:2] == ["kwargs"] or (parts[1:2] == ["args"] and parts[2:3] and parts[2].isdigit())
        parts = parts[3:] if gathered else parts[2:]
    return ".".join(parts) or node.name


_STORES = ("_modules", "_parameters", "_buffers", "__dict__", "__wrapped__", "__self__", "_orig_mod")
"""Where modules, wrappers and bound methods keep what they hold: no part of a module's name."""


def is_transformed(known: Any) -> bool:
    """Whether an example value stands inside ``torch.vmap``, ``jvp`` or ``grad``: it has no memory of its own."""
    return isinstance(known, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(known)


def value(node: Any) -> Any:
    """The example value Dynamo recorded for a node (fake tensor, SymInt or number), or of a view of one; other things
    are their own value."""
    if isinstance(node, View):
        with _fake_mode(value(node.node)):
            return node.apply(value(node.node))
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else node


def size_of(size: Any, before: fx.Node) -> int | fx.Node | None:
    """A size as an argument of a node that stands at ``before``: the number, or the node earlier in the graph that
    holds the symbol; None where no node does. Installs no guard."""
    if isinstance(size, int):
        return size
    node: fx.Node
    for node in before.graph.nodes:
        if node is before:
            break
        if isinstance(known := value(node), torch.SymInt) and str(known) == str(size):
            return node
    return None
