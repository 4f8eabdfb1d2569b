"""What is compared: ways to compile one module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Contender:
    """A name for the table and how to compile: no ``backend`` is eager."""

    name: str
    backend: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def compile(self, module: torch.nn.Module, fullgraph: bool = True) -> Callable[..., Any]:
        """``module``, compiled as this contender does. fullgraph: raise where Dynamo would split the graph."""
        if self.backend is None:
            return module
        compiled: Callable[..., Any] = torch.compile(
            module, backend=self.backend, options=self.options or None, fullgraph=fullgraph
        )
        return compiled


RIVALS = (Contender("eager"), Contender("inductor", "inductor"))
"""Both dense; the first is what the others are compared with."""
