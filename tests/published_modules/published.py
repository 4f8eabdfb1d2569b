"""A table of attention modules as public repositories write them, in this project's own words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stem_compile.reasons import Reason

N, WIDTH, HEADS, BATCH = 160, 64, 4, 2
DIM = WIDTH // HEADS
Inputs = Callable[[], tuple[Any, ...]]


def tokens() -> tuple[torch.Tensor, ...]:
    """Hidden states [BATCH, N, WIDTH]."""
    return (torch.randn(BATCH, N, WIDTH),)


def padded() -> tuple[torch.Tensor, ...]:
    """Hidden states and a padding mask [BATCH, N] of zeros and ones, the first row padded on the left."""
    mask = torch.ones(BATCH, N, dtype=torch.long)
    mask[0, :21] = 0
    return (*tokens(), mask)


@dataclass(frozen=True)
class Published:
    """One module.

    source: the repository that writes attention so. reason: why it must stay dense, None where it must be rewritten.
    causal: whether later keys are hidden from earlier queries.
    """

    name: str
    source: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    reason: Reason | None
    causal: bool


PUBLISHED: dict[str, Published] = {}


def published(
    source: str,
    *,
    inputs: Inputs = tokens,
    reason: Reason | None = None,
    causal: bool = True,
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Add a module to the table."""

    def add(build: type[nn.Module]) -> type[nn.Module]:
        PUBLISHED[build.__name__] = Published(build.__name__, source, build, inputs, reason, causal)
        return build

    return add


def split(x: torch.Tensor, heads: int = HEADS) -> torch.Tensor:
    """[B, N, heads * d] as [B, heads, N, d]."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def merge(x: torch.Tensor) -> torch.Tensor:
    """[B, heads, N, d] as [B, N, heads * d]."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def rotated(x: torch.Tensor, base: float = 10000.0) -> torch.Tensor:
    """Rotary position embedding of [..., N, d], halves turned against each other."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] / base ** (torch.arange(half) / half)[None, :]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def slopes(heads: int = HEADS) -> torch.Tensor:
    """ALiBi's slopes."""
    return 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)
