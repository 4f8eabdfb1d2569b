"""Dynamo's graph of a function, and what the passes see in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from stem_compile.config import StemConfig
from stem_compile.passes import pipeline
from stem_compile.passes.pipeline import Rewrite


def graph_of(function: Callable[..., Any], inputs: tuple[Any, ...], dynamic: bool | None = None) -> fx.GraphModule:
    """The one graph that Dynamo captures."""
    graphs: list[fx.GraphModule] = []

    def keep(module: fx.GraphModule, _: Any) -> Any:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep, fullgraph=True, dynamic=dynamic)(*inputs)
    return graphs[0]


def rewritten(
    function: Callable[..., Any], inputs: tuple[Any, ...], dynamic: bool | None = None, **options: Any
) -> tuple[Rewrite, Any]:
    """(what the pipeline did with every pass verified, the compiled function's output)."""
    config = StemConfig(**{"min_length": 0, "budget": 1.0, "verify": True, **options})
    rewrites: list[Rewrite] = []

    def keep(module: fx.GraphModule, _: Any) -> Any:
        rewrites.append(pipeline.run(module, config))
        return module.forward

    torch._dynamo.reset()
    out = torch.compile(function, backend=keep, fullgraph=True, dynamic=dynamic)(*inputs)
    return rewrites[0], out
