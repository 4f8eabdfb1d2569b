"""One Dynamo trace that serves many options: the backend runs on copies of the graph, each when it is first asked for.

Tracing a model costs seconds and a check runs it under many options, so ``torch.compile`` captures once and ``choose``
says what a call runs. Only for
``inner="eager"``: other inner compilers work while Dynamo traces, and get a ``torch.compile`` of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

Build = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]
"""A backend: graph and example inputs -> what runs."""


class Traced:
    """``model`` compiled once. Call ``run(key, build, *args)``; ``build`` is asked once a graph and key."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._key: Any = None
        self._build: Build | None = None
        self._graphs: list[dict[Any, Callable[..., Any]]] = []
        self._compiled: Any = None

    @property
    def buffers(self) -> frozenset[int]:
        """Identities of the model's buffers."""
        return frozenset(map(id, self._model.buffers()))

    def run(self, key: Any, build: Build, *args: Any, **kwargs: Any) -> Any:
        """The model's result, its graphs run by what ``build`` makes of them."""
        if self._compiled is None:
            self._compiled = torch.compile(self._model, backend=self._backend, dynamic=True)
        self._key, self._build = key, build
        # Many examples differ in what Dynamo specialises on (a batch of 1, a cache or none); that is no user's loop.
        with torch._dynamo.config.patch(recompile_limit=64), torch.no_grad():
            return self._compiled(*args, **kwargs)

    def forget(self, keep: Callable[[Any], bool] = lambda key: False) -> None:
        """Build anew at the next call, from the graphs as they were traced; ``keep`` picks keys to spare."""
        for built in self._graphs:
            for key in [k for k in built if not keep(k)]:
                del built[key]

    def _backend(self, module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        built: dict[Any, Callable[..., Any]] = {}
        self._graphs.append(built)
        # While Dynamo traces, comparing symbolic lengths installs guards: the first build must happen here.
        assert self._build is not None
        built[self._key] = self._build(copied(module), inputs)

        def call(*args: Any) -> Any:
            if self._key not in built:
                assert self._build is not None
                built[self._key] = self._build(copied(module), inputs)
            return built[self._key](*args)

        return call


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph module over a graph of its own; parameters are shared."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    twin = fx.GraphModule(module, graph)
    twin.meta = copy.copy(module.meta)
    for name, child in module.named_children():
        # Bodies of higher-order operators, which the passes rewrite in place too.
        if isinstance(child, fx.GraphModule):
            setattr(twin, name, copied(child))
    return twin


def primary(result: Any) -> torch.Tensor:
    """The output that is compared: logits, else the last hidden state, else the first floating tensor. Raises TypeError
    without one."""
    for name in ("logits", "last_hidden_state"):
        output = getattr(result, name, None)
        if isinstance(output, torch.Tensor):
            return output
    for leaf in torch.utils._pytree.tree_leaves(result):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf
    raise TypeError(f"the model returned no floating tensor but a {type(result).__name__}")
