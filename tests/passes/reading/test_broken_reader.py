"""A reader that fails costs one tensor, which is then kept as it is; never the graph, and never the result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stem_compile.passes.graph import normalize
from stem_compile.passes.reading.interpret import register_reader, unregister_reader
from tests.numerics import assert_close
from tests.passes.by_hand import randn
from tests.passes.capture import rewritten

ERRORS = (TypeError, ValueError, KeyError, ZeroDivisionError, RecursionError, AssertionError)


@pytest.fixture(params=ERRORS, ids=lambda e: e.__name__)
def _broken(request: pytest.FixtureRequest) -> Iterator[None]:
    def fails(*_: Any) -> Any:
        raise request.param("on purpose")

    register_reader("sin", fails, normalize.signature("input"))
    yield
    unregister_reader("sin")
    del normalize.SIGNATURES["sin"]


@pytest.mark.usefixtures("_broken")
def test_what_a_broken_reader_does_not_read_is_kept() -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        i, j = torch.arange(60)[:, None], torch.arange(60)[None, :]
        mask = ((torch.sin(j * 1.0) < 0.5) & (j <= i)) | (i == j)
        first = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return F.scaled_dot_product_attention(first, k, v, is_causal=True)

    inputs = tuple(randn(1, 2, 60, 16, seed=seed) for seed in range(3))
    result, out = rewritten(model, inputs)
    assert len(result.sites) == 2
    assert_close(out, model(*inputs))
