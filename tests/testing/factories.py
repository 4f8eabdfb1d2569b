"""What tests name as ``module:factory``."""

from __future__ import annotations

import functools
from typing import Any

import torch

from tests.testing.models import Plain, plain


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


def not_a_number() -> torch.nn.Module:
    """A model whose own output is NaN."""
    model = plain()
    with torch.no_grad():
        model.qkv.weight.fill_(float("nan"))  # type: ignore[union-attr]
    return model


@torch.library.custom_op("stem_tests::only_fp32", mutates_args=())
def only_fp32(x: torch.Tensor) -> torch.Tensor:
    """x, as a kernel that was written for one dtype returns it."""
    if x.dtype != torch.float32:
        raise RuntimeError("expected scalar type Float but found Double")
    return x.clone()


only_fp32.register_fake(torch.empty_like)


def unsteady() -> torch.nn.Module:
    """A model whose output half precision's rounding turns into another, as it sends a token to another expert."""

    class Unsteady(Plain):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.sin(super().forward(tokens) * 2e4)

    torch.manual_seed(0)
    return Unsteady().eval()


def between_graphs() -> torch.nn.Module:
    """A model that multiplies by weights of its own dtype where Dynamo breaks its graph."""

    class Between(Plain):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.last(super().forward(tokens))

        @torch._dynamo.disable
        def last(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.embedding.weight

    torch.manual_seed(0)
    return Between().eval()


def no_fp64() -> torch.nn.Module:
    """A model that runs in fp32 only, as one with quantised weights does."""

    class Only32(Plain):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return only_fp32(super().forward(tokens))

    torch.manual_seed(0)
    return Only32().eval()
