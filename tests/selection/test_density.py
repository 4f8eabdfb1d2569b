"""Densities foretold are those of selections that were made."""

from __future__ import annotations

import pytest
import torch

from stem_compile.config import StemConfig
from stem_compile.selection import tpd
from stem_compile.selection.density import causal_density, kept_from


@pytest.mark.parametrize("tokens", [100, 2048, 2049, 5000])
@pytest.mark.parametrize(
    "options",
    [
        {"budget": 0.25},
        {"budget": 0.0625, "block_size": 64},
        {"budget": 0.5, "key_block_size": 32, "sink_blocks": 0},
        {"policy": "output_aware", "budget": 0.25},
        {},
    ],
)
def test_a_density_foretold_is_that_of_a_selection(options: dict[str, object], tokens: int) -> None:
    spec = StemConfig.from_options(options).selection
    rows, columns = -(-tokens // spec.block_q), -(-tokens // spec.block_k)
    last = ((torch.arange(rows) + 1) * spec.block_q).clamp(max=tokens) - 1
    visible = torch.arange(columns) * spec.block_k <= last[:, None]
    scores = torch.randn(1, 1, rows, columns).masked_fill(~visible, -torch.inf)
    density = tpd.tpd_select(scores, spec).density(visible[None, None])
    assert causal_density(spec, tokens) == pytest.approx(density, abs=1e-9)


def test_a_budget_is_kept_from_its_length_on() -> None:
    spec = StemConfig(budget=0.25).selection
    start = kept_from(spec)
    assert start is not None
    assert all(causal_density(spec, n) <= 0.275 for n in (start, 2 * start, 5 * start))
    assert causal_density(spec, start * 4 // 5) > 0.275
    assert kept_from(StemConfig().selection) is None
    assert causal_density(StemConfig(policy="dense").selection, 9000) == 1.0
