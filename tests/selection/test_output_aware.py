"""``policy="output_aware"``: bidirectional attention under one budget a row, and the same policy on causal
attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stem_compile import selection
from stem_compile.passes.graph.sites import Rejected
from stem_compile.reasons import Reason
from stem_compile.selection import FULL, SelectionSpec, policies, tpd
from tests.numerics import assert_close
from tests.passes.capture import rewritten


def _qkv(n: int = 640) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(1, 2, n, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))


@pytest.mark.parametrize("budget", [1.0, 0.25])
def test_an_encoder_is_rewritten_for_who_asks(budget: float) -> None:
    observed: list[selection.Observed] = []
    with selection.observe(observed.append):
        result, out = rewritten(
            F.scaled_dot_product_attention, _qkv(), policy="output_aware", budget=budget, block_size=64
        )
    assert [s.words for s in result.sites] == ["full"]
    assert observed[0].density == (1.0 if budget == 1.0 else pytest.approx(0.3, abs=0.15))
    if budget == 1.0:
        assert_close(out, F.scaled_dot_product_attention(*_qkv()))


def test_an_encoder_stays_dense_by_default() -> None:
    result, _ = rewritten(F.scaled_dot_product_attention, _qkv())
    assert [h.reason for h in result.attentions if isinstance(h, Rejected)] == [Reason.BIDIRECTIONAL]


def test_every_long_row_has_the_same_budget() -> None:
    spec = SelectionSpec(policy="output_aware", budget=0.25, block_q=64, block_k=64, sink_blocks=0, local_blocks=1)
    scores = torch.rand(1, 1, 64, 64).masked_fill(torch.ones(64, 64, dtype=torch.bool).triu(1), -torch.inf)
    counts = tpd.tpd_select(scores, spec).counts[0, 0]
    assert set(counts[16:63].tolist()) == {16}
    assert counts[-1] == FULL
    assert policies.get("output_aware").width(spec, 64) >= 16
