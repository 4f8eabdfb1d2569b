"""The graphs inside a graph: bodies of higher-order operators (checkpointed blocks, ``torch.cond``), which Dynamo keeps
as submodules of the graph that calls them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from stem_compile.passes.graph import normalize

INLINE = (
    "tag_activation_checkpoint",
    "wrap",
    "wrap_activation_checkpoint",
    "wrap_with_set_grad_enabled",
    "wrap_with_autocast",
    "inductor_compiled_code",
    "invoke_subgraph",
)
"""Operators that run their body once, as if it were written where they stand: attentions inside are rewritten."""
FUNCTIONS = ("flex_attention", "flex_attention_backward")
"""Operators whose bodies are functions of one score, which hold no attention."""


@dataclass(frozen=True)
class Region:
    """One graph. module: holds it. operator: name of the operator whose body it is, "" for the outermost graph.
    inline: whether the body runs once, where the operator stands."""

    module: fx.GraphModule
    operator: str = ""
    inline: bool = True

    @property
    def graph(self) -> fx.Graph:
        """The graph, which a restored module has anew."""
        return self.module.graph


def regions(module: fx.GraphModule) -> list[Region]:
    """Every graph that a run of ``module`` may execute, the outermost first; one called twice is there once."""
    reachable = [Region(module)]
    for region in reachable:
        for node in region.graph.nodes:
            for inner in bodies(node):
                if all(inner is not r.module for r in reachable):
                    name = str(normalize.spelling(node))
                    reachable.append(Region(inner, name, region.inline and name in INLINE))
    return reachable


def bodies(node: fx.Node) -> Iterator[fx.GraphModule]:
    """Graphs that a node runs; none for anything but a higher-order operator."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
        return
    owner = node.graph.owning_module
    if owner is None or node.target.name() in FUNCTIONS:
        return
    for argument in node.all_input_nodes:
        body = getattr(owner, str(argument.target), None) if argument.op == "get_attr" else None
        if isinstance(body, fx.GraphModule):
            yield body
