"""What tests name as ``module:factory``."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.testing.models import plain


def broken() -> torch.nn.Module:
    """A model whose own forward fails for every input."""

    class Broken(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("broken by design")

    return Broken(8, 8)


def with_example(tokens: int) -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    """(model, args) for a prompt of this length."""
    return plain(), (torch.randint(0, 50, (2, tokens), generator=torch.Generator().manual_seed(0)),)


def pair() -> tuple[torch.nn.Module, Any]:
    """(model, make_inputs)."""
    return plain(), functools.partial(_tokens, 50)


def _tokens(vocabulary: int, batch: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def nothing() -> int:
    """No model."""
    return 1
