"""Run a part of a captured graph on small made-up inputs, on a CPU: what the graph itself computes, to compare with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from stem_compile.passes.graph import memory
from stem_compile.passes.graph.values import value

LARGEST = 1 << 22
"""Elements of the largest tensor that is made up or computed."""


class NotShown(Exception):
    """The example cannot be run, or not cheaply: nothing is said about the graph."""


class Example:
    """Values of one graph's nodes under made-up inputs.

    graph: whose nodes are asked for. sizes: symbols of symbolic lengths -> the sympy numbers that they get. draw: 0
    makes up ordinary numbers, 1 what masks and positions hold: rising integers, floats that are 0 or very negative.
    """

    def __init__(self, graph: fx.Graph, sizes: Mapping[Any, Any], draw: int) -> None:
        self.sizes, self.draw = dict(sizes), draw
        self._generator = torch.Generator().manual_seed(draw)
        self._writers = memory.writers(graph)

    def size(self, number: Any) -> int:
        """An int for an int or a SymInt. Raises NotShown for sizes that only a run knows."""
        return int(self.number(number))

    def number(self, number: Any) -> int | float | bool:
        """A Python number for a number that may be symbolic. Raises NotShown for one that only a run knows."""
        if not isinstance(number, torch.SymInt | torch.SymFloat | torch.SymBool):
            return number  # type: ignore[no-any-return]
        expr = number.node.expr.xreplace(self.sizes)
        if expr.free_symbols:
            raise NotShown(f"{number} is known at run time only")
        if isinstance(number, torch.SymFloat):
            return float(expr)
        return bool(expr) if isinstance(number, torch.SymBool) else int(expr)

    def shape(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """Shape in the example. Raises NotShown where it is too large."""
        shape = tuple(self.size(n) for n in tensor.shape)
        elements = 1
        for n in shape:
            elements *= n
        if elements > LARGEST:
            raise NotShown(f"a tensor of {elements} elements")
        return shape

    def stand_in(self, known: torch.Tensor) -> torch.Tensor:
        """A tensor with the dtype and, in the example, the shape of an example value."""
        shape, dtype = self.shape(known), known.dtype
        if dtype == torch.bool:
            return torch.rand(shape, generator=self._generator) < 0.7
        if dtype.is_floating_point:
            if self.draw == 0 or len(shape) < 2:
                return torch.randn(shape, generator=self._generator).to(dtype)
            hidden = torch.rand(shape, generator=self._generator) < 0.3
            # A mask of queries and keys is added as it is; what has fewer dimensions may be multiplied first.
            least = torch.finfo(dtype).min if min(shape[-2:]) > 1 and len(shape) > 2 else -1e4
            return torch.zeros(shape, dtype=dtype).masked_fill_(hidden, least)
        if dtype.is_complex:
            raise NotShown("complex numbers")
        if self.draw == 0 or not shape:
            return torch.randint(0, 2, shape, generator=self._generator).to(dtype)
        return torch.arange(shape[-1]).expand(shape).to(dtype).contiguous()

    def run(self, wanted: Iterable[fx.Node], given: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        """Values of ``wanted`` and of all that they are computed from. given: nodes whose value is known beforehand.

        Raises NotShown where an operation fails or its result has another shape than the graph recorded.
        """
        known = dict(given)
        for node in self._needed(wanted, known):
            known[node] = self._value(node, known)
        return known

    def _needed(self, wanted: Iterable[fx.Node], given: Mapping[fx.Node, Any]) -> list[fx.Node]:
        """Nodes to run, in order: ancestors, and what writes into their memory before the last of them."""
        wanted = [n for n in wanted if n not in given]
        needed: set[fx.Node] = set()
        frontier = list(wanted)
        while frontier:
            node = frontier.pop()
            if node in needed or node in given:
                continue
            needed.add(node)
            frontier += node.all_input_nodes
            if not frontier and self._writers:
                held = frozenset().union(*(memory.memory(n) for n in needed))
                frontier += [
                    w
                    for w in self._writers
                    if w not in needed
                    and any(w < last for last in wanted)
                    and any(memory.memory(t) & held for t in memory.written(w))
                ]
        return sorted(needed)

    def _value(self, node: fx.Node, known: Mapping[fx.Node, Any]) -> Any:
        recorded = value(node)
        if isinstance(recorded, int | float | torch.SymInt | torch.SymFloat | torch.SymBool):
            return self.number(recorded)
        if node.op in ("placeholder", "get_attr"):
            if not isinstance(recorded, torch.Tensor):
                raise NotShown(f"{node.name} is no tensor")
            return self.stand_in(recorded)
        if isinstance(recorded, torch.Tensor):
            self.shape(recorded)
        try:
            arguments: Any = fx.node.map_aggregate(node.args, lambda a: self._argument(a, known))
            keywords: Any = fx.node.map_aggregate(node.kwargs, lambda a: self._argument(a, known))
            if node.op == "call_method":
                result = getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)
            elif node.op == "call_function":
                result = node.target(*arguments, **keywords)  # type: ignore[operator]
            else:
                raise NotShown(f"{node.name} calls a module")
        except NotShown:
            raise
        except Exception as error:
            raise NotShown(f"{node.name}: {type(error).__name__}: {error}") from error
        if isinstance(recorded, torch.Tensor) and (
            not isinstance(result, torch.Tensor) or tuple(result.shape) != self.shape(recorded)
        ):
            raise NotShown(f"{node.name} has another shape in the example")
        return result

    def _argument(self, argument: Any, known: Mapping[fx.Node, Any]) -> Any:
        if isinstance(argument, fx.Node):
            return known[argument]
        if isinstance(argument, torch.SymInt | torch.SymFloat | torch.SymBool):
            return self.number(argument)
        if isinstance(argument, torch.device):
            return torch.device("cpu")
        if isinstance(argument, str) and argument.partition(":")[0] in ("cuda", "xpu", "mps", "hpu"):
            return "cpu"
        return argument
