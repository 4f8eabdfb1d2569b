"""Sizes computed from lengths are expressions of the algebra: one compilation serves every length."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from stem_compile.config import StemConfig
from stem_compile.passes import pipeline
from tests.numerics import assert_close
from tests.passes.by_hand import randn

Mask = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def _joined_at_the_middle(i: torch.Tensor, j: torch.Tensor, n: int) -> torch.Tensor:
    mask = torch.ones(n, n, dtype=torch.bool).tril()
    return torch.cat([mask[:, : n // 2], mask[:, n // 2 :]], 1)


MASKS: dict[str, Mask] = {
    "n // 2": lambda i, j, n: (j <= i) | (j < n // 2),
    "n // 4 - 1": lambda i, j, n: (j <= i) | (j < n // 4 - 1),
    "rounded up": lambda i, j, n: (j <= i) & (j < (n + 63) // 64 * 64 - 5),
    "n >> 1": lambda i, j, n: (j <= i) | (j < (n >> 1)),
    "n << 1": lambda i, j, n: (j <= i) & (j < (n << 1)),
    "n % 7": lambda i, j, n: (j <= i) | (j < n % 7),
    "int(n * .25)": lambda i, j, n: (j <= i) | (j < int(n * 0.25)),
    "int(sqrt(n))": lambda i, j, n: (j <= i) & ((i - j) < 3 * int(math.sqrt(n))),
    "n * .25": lambda i, j, n: (j <= i) | (j < n * 0.25),
    "n * .3": lambda i, j, n: (j <= i) | (j < n * 0.3),
    "max": lambda i, j, n: (j <= i) & (j < max(n - 5, 100)),
    "min": lambda i, j, n: (j <= i) | (j < min(n // 3, 40)),
    "a slice at n // 2": _joined_at_the_middle,
    "from n // 2": lambda i, j, n: (j <= i) & (j < torch.arange(n)[n // 2 :][:1]),
    "from the end": lambda i, j, n: (j <= i) & (torch.arange(n)[-(n // 2) :][0] > j - 3),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_of_computed_sizes_serves_every_length(name: str) -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n = q.shape[2]
        i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=MASKS[name](i, j, n))

    _serves_every_length(model)


SCALES: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "over the root of the length": lambda s, n: s / math.sqrt(n),
    "times the length": lambda s, n: s * (n / 1000),
}


@pytest.mark.parametrize("name", SCALES)
def test_a_scale_of_the_length_serves_every_length(name: str) -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n = q.shape[2]
        hidden = torch.arange(n)[None, :] > torch.arange(n)[:, None]
        return SCALES[name](q @ k.transpose(-1, -2), n).masked_fill(hidden, -1e9).softmax(-1) @ v

    _serves_every_length(model)


def _serves_every_length(model: Callable[..., torch.Tensor]) -> None:
    sites: list[int] = []

    def backend(module: fx.GraphModule, _: Any) -> Any:
        sites.append(len(pipeline.run(module, StemConfig(min_length=1, budget=1.0, verify=True)).sites))
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for n in (96, 121, 160, 73):
        inputs = tuple(randn(1, 2, n, 16, seed=seed) for seed in range(3))
        assert_close(compiled(*inputs), model(*inputs))
    assert sites == [1, 1]
