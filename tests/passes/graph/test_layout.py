"""Where a user can see it, a result lies in memory as eager's does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stem_compile import ops
from stem_compile.testing.tolerances import CLOSE_DEEP
from tests.numerics import assert_close
from tests.passes.capture import rewritten

N = 70


def by_hand(x: torch.Tensor) -> torch.Tensor:
    n = x.shape[-2]
    return torch.softmax(x @ x.transpose(-1, -2) / 4 + torch.full((n, n), -torch.inf).triu(1), -1) @ x


def viewed_and_written(x: torch.Tensor) -> Any:
    out = by_hand(x)
    out.view(-1, N, 16).mul_(2)
    return out


def reshaped_and_written(x: torch.Tensor) -> Any:
    """In eager ``reshape`` copies here, so that the write does not reach ``out``."""
    out = by_hand(x)
    rows = out.transpose(1, 2).reshape(2, N, -1)
    rows.mul_(2)
    return out + 0, rows


VISIBLE: dict[str, Callable[[torch.Tensor], Any]] = {
    "returned": by_hand,
    "returned by an operator that keeps strides": lambda x: by_hand(x) * 2,
    "returned transposed": lambda x: by_hand(x).transpose(1, 2),
    "viewed and written": viewed_and_written,
    "reshaped and written": reshaped_and_written,
    "as_strided": lambda x: by_hand(x).as_strided((N, 16), (16, 1)),
    "asked for its stride": lambda x: x * by_hand(x).stride(1),
    "asked whether it is contiguous": lambda x: x * by_hand(x).is_contiguous(),
    "viewed as another dtype": lambda x: by_hand(x).view(torch.int32).ne(0),
    "fused attention": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "by einsum": lambda x: torch.einsum("bhij,bhjd->bihd", by_hand(x) @ x.mT, x).contiguous(),
}


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", VISIBLE)
def test_strides_are_those_of_eager(name: str, dynamic: bool | None) -> None:
    x = torch.randn(2, 3, N, 16, generator=torch.Generator().manual_seed(0))
    rewrite, out = rewritten(VISIBLE[name], (x,), dynamic=dynamic)
    assert rewrite.sites
    wanted = VISIBLE[name](x)
    for ours, theirs in zip(*(t if isinstance(t, tuple) else (t,) for t in (out, wanted)), strict=True):
        assert_close(ours, theirs, CLOSE_DEEP)
        assert ours.stride() == theirs.stride()


def test_nothing_is_copied_where_nobody_looks() -> None:
    rewrite, _ = rewritten(lambda x: by_hand(x).transpose(1, 2).reshape(2, N, -1), (torch.randn(2, 3, N, 16),))
    attention = next(n for n in rewrite.module.graph.nodes if n.target is ops.SPARSE_ATTENTION)
    assert [str(n.target) for n in attention.users] == ["transpose"]


def test_a_result_can_be_viewed_outside() -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(by_hand, backend="stem", options={"min_length": 0, "budget": 1.0})(torch.randn(2, 3, N, 16))
    assert out.view(-1).shape == (2 * 3 * N * 16,)
