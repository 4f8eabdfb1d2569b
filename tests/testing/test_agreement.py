"""Two runs select alike: ties may go either way, and nothing else may."""

from __future__ import annotations

import pytest
import torch

from stem_compile.selection import Attention, BlockSelection, Observed
from stem_compile.selection import SelectionSpec as Spec
from stem_compile.selection.oam import oam_scores
from stem_compile.selection.tpd import tpd_select
from stem_compile.testing import agreement
from stem_compile.testing.violation import Violation

SPEC = Spec(budget=0.3, block_q=64, block_k=32, sink_blocks=1, local_blocks=1)
ROW = 12
"""A row of query blocks that leaves blocks out."""


def observed() -> Observed:
    """A selection of 16 rows of one head, by its scores."""
    torch.manual_seed(0)
    q, k, v = (3 * torch.randn(1, 1, 1024, 16) for _ in range(3))
    attention = Attention(q, k, v, "kv <= q", 0.25, SPEC.text())
    return Observed(tpd_select(oam_scores(attention), SPEC, attention.reach, 1), attention)


def exchanged(given: Observed) -> torch.Tensor:
    """What it computes, but for ``ROW``: its best block that is no forced one gives way to one that it left out."""
    dense = given.selection.dense(given.candidates).clone()
    row, candidates = dense[0, 0, ROW], given.candidates[0, 0, ROW]
    inner = row.nonzero()[1:-1, 0]
    row[inner[0]] = False
    row[(candidates & ~given.selection.dense(given.candidates)[0, 0, ROW]).nonzero()[0, 0]] = True
    return dense


def test_equal_selections_agree() -> None:
    first = observed()
    assert agreement.forced(agreement.dense_of([first]), "a run")(0, first) is None


def test_a_run_that_takes_better_blocks_than_wanted_disagrees() -> None:
    first = observed()
    with pytest.raises(Violation, match=rf"selects other blocks at .* \(0, 0, {ROW}\)"):
        agreement.forced([exchanged(first)], "a run")(0, first)


def test_a_run_that_takes_worse_blocks_than_wanted_disagrees() -> None:
    first = observed()
    worse = Observed(agreement.packed(exchanged(first), first), first.attention)
    assert torch.equal(agreement.dense_of([worse])[0], exchanged(first))
    with pytest.raises(Violation, match=rf"selects other blocks at .* \(0, 0, {ROW}\)"):
        agreement.forced(agreement.dense_of([first]), "a run")(0, worse)


def test_ties_may_go_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    first = observed()
    monkeypatch.setattr(agreement, "oam_scores", lambda attention: torch.zeros(1, 1, 16, 32))
    selection = agreement.forced([exchanged(first)], "a run")(0, first)
    assert isinstance(selection, BlockSelection)
    assert torch.equal(selection.dense(first.candidates), exchanged(first))
