"""Whether a mask of positions runs forward, whatever its spelling."""

from __future__ import annotations

from typing import Any

import pytest
import sympy

from stem_compile.algebra.symbolic import KV, FloorDiv, Q, tensor
from stem_compile.passes.reading.order import runs_forward

# name: (visible keys, whether they run forward)
MASKS: dict[str, tuple[Any, bool]] = {
    "causal": (KV <= Q, True),
    "frames": (FloorDiv(Q, 16) >= FloorDiv(KV, 16), True),
    "frames, four before": (
        sympy.And(FloorDiv(Q, 16) >= FloorDiv(KV, 16), FloorDiv(Q, 16) - FloorDiv(KV, 16) < 4),
        True,
    ),
    "a prefix": (sympy.Or(KV <= Q, KV < 20), True),
    "a window behind": (sympy.And(KV <= Q, KV > Q - 9), True),
    "a window on both sides": (sympy.Abs(Q - KV) < 9, False),
    "blocks": (sympy.Eq(FloorDiv(Q, 16), FloorDiv(KV, 16)), False),
    "the future": (KV >= Q, False),
    "everything": (sympy.true, False),
    "nothing": (sympy.false, False),
    "every second key": (sympy.Eq(sympy.Mod(KV, 2), 0), False),
    "what is read": (tensor(0)(KV) <= tensor(0)(Q), False),
}


@pytest.mark.parametrize("length", [200, 3000])
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_runs_forward_where_queries_look_back_further_than_ahead(name: str, length: int) -> None:
    predicate, forward = MASKS[name]
    assert runs_forward(predicate, length, length) is forward


def test_queries_behind_a_prefix_look_back_at_it() -> None:
    assert runs_forward(KV <= Q + 50, 100, 150)
    assert not runs_forward(sympy.true, 20, 150)


def test_symbolic_lengths_are_looked_at_in_one_size() -> None:
    assert runs_forward(FloorDiv(Q, 16) >= FloorDiv(KV, 16), sympy.Symbol("n"), sympy.Symbol("n"))
