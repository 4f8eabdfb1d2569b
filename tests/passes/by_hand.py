"""FX graphs built by hand: each node carries the real value that it has, as Dynamo's carry fake ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx


class GraphByHand:
    """A graph under construction. ``graph`` is the FX graph so far."""

    def __init__(self) -> None:
        self.graph = fx.Graph()

    def given(self, name: str, example: Any) -> fx.Node:
        """An input with its value."""
        node = self.graph.placeholder(name)
        node.meta["example_value"] = example
        return node

    def call(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> fx.Node:
        """A call of a function."""
        node = self.graph.call_function(function, arguments, keywords)
        node.meta["example_value"] = function(*_values(arguments), **_values(keywords))
        return node

    def method(self, name: str, *arguments: Any, **keywords: Any) -> fx.Node:
        """A call of a method of the first argument."""
        node = self.graph.call_method(name, arguments, keywords)
        first, *rest = _values(arguments)
        node.meta["example_value"] = getattr(first, name)(*rest, **_values(keywords))
        return node


def _values(arguments: Any) -> Any:
    return fx.node.map_arg(arguments, lambda node: node.meta["example_value"])


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
