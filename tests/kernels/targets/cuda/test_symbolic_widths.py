"""Under dynamic shapes a head's width may be a symbol when kernels are looked up."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from stem_compile.kernels.targets.cuda import target
from stem_compile.selection import Attention, SelectionSpec


@pytest.mark.parametrize("pooling", ["mass", "mean", "max"])
def test_kernels_are_looked_up_by_numbers(pooling: str) -> None:
    pytest.importorskip("triton")
    mode = FakeTensorMode(shape_env=ShapeEnv())
    symbolic = StatelessSymbolicContext([DimDynamic.DYNAMIC] * 4)
    q, k, v = (mode.from_tensor(torch.zeros(2, 4, 300, 32), symbolic_context=symbolic) for _ in range(3))
    assert isinstance(q.shape[-1], torch.SymInt)
    attention = Attention(q, k, v, "kv <= q", 0.1, SelectionSpec(pooling=pooling).text())
    assert target.supports(attention) is None
    names = target.kernels(attention)
    assert "32" in names.attend and "32" in names.select
