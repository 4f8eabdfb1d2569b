"""Insert a call of an operator with what a captured graph's own nodes carry."""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx

from stem_compile.passes.graph.values import value


def call(graph: fx.Graph, target: Any, arguments: tuple[Any, ...], origin: fx.Node) -> fx.Node:
    """Insert a call with the shapes and the place in the model that later passes and tools read."""
    node = graph.call_function(target, arguments)
    node.meta = {k: v for k, v in origin.meta.items() if k in ("nn_module_stack", "stack_trace", "source_fn_stack")}
    examples = fx.node.map_arg(arguments, value)
    tensors = [e for e in pytree.tree_leaves(examples) if isinstance(e, torch.Tensor) and hasattr(e, "fake_mode")]
    if tensors:
        with tensors[0].fake_mode:
            node.meta["example_value"] = target(*examples)
    elif isinstance(examples[0], tuple):
        node.meta["example_value"] = target(*examples)
    return node
