"""Logits taken apart: which keys are visible, the scale, the score."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch

from stem_compile.algebra.symbolic import KV, SCORE, B, H, Q, Where, tensor
from stem_compile.passes.reading.expressions import HIDDEN
from stem_compile.passes.reading.split_logits import is_deep, split_logits
from stem_compile.passes.reading.weigh_hidden import evenly_hidden

CAUSAL, WINDOW = KV <= Q, KV > Q - 8
LOWEST = sympy.Rational(torch.finfo(torch.float32).min)
MINUS_INFINITY = sympy.Rational(HIDDEN)
ZERO = sympy.Integer(0)
BIAS, TOP = tensor(0)(B, ZERO, Q, KV), tensor(1)(B, ZERO, Q, ZERO)
TENTH = sympy.Rational(1, 10)

# name: (logits, visible keys, scale, score)
SPLIT: dict[str, tuple[Any, Any, float, Any]] = {
    "added": (SCORE * TENTH + Where(CAUSAL, ZERO, LOWEST), CAUSAL, 0.1, SCORE),
    "filled in": (Where(CAUSAL, SCORE, MINUS_INFINITY), CAUSAL, 1.0, SCORE),
    "filled where hidden": (Where(sympy.Not(CAUSAL), MINUS_INFINITY, SCORE), CAUSAL, 1.0, SCORE),
    "two masks": (SCORE + Where(CAUSAL, ZERO, LOWEST) + Where(WINDOW, ZERO, LOWEST), CAUSAL & WINDOW, 1.0, SCORE),
    "multiplied": (SCORE - 10000 * (1 - Where(CAUSAL, sympy.Integer(1), ZERO)), CAUSAL, 1.0, SCORE),
    "visible at -9000": (
        SCORE + Where(CAUSAL, sympy.Integer(-9000), sympy.Integer(-(10**9))),
        CAUSAL,
        1.0,
        SCORE - 9000,
    ),
    "a distance": (SCORE * 2 + (KV - Q) * TENTH, sympy.true, 2.0, SCORE + (KV - Q) * TENTH),
    "softcap": (20 * sympy.tanh(SCORE / 20), sympy.true, 1.0, 20 * sympy.tanh(SCORE / 20)),
    "rectified": (sympy.Max(SCORE, 0), sympy.true, 1.0, sympy.Max(SCORE, 0)),
    "hidden only numerically": (
        SCORE + Where(CAUSAL, ZERO, sympy.Integer(-1000)),
        sympy.true,
        1.0,
        SCORE + Where(CAUSAL, ZERO, sympy.Integer(-1000)),
    ),
}


@pytest.mark.parametrize("name", SPLIT)
def test_logits_are_a_mask_a_scale_and_a_score(name: str) -> None:
    logits, visible, scale, score = SPLIT[name]
    predicate, factor, split = split_logits(logits)
    assert predicate == visible
    assert factor == pytest.approx(scale)
    for place in ({SCORE: 0.7, Q: 9, KV: 5}, {SCORE: -31.0, Q: 5, KV: 9}):
        assert float(split.expr.subs(place)) == pytest.approx(float(score.subs(place)))


def test_entries_of_a_bias_hide_relative_to_their_row() -> None:
    predicate, _, score = split_logits(SCORE + BIAS, lambda load: TOP if load == BIAS else None)
    assert predicate == sympy.Gt(BIAS - TOP, -8000.0)
    assert score.expr.xreplace({sympy.Le(TOP, -1e30): sympy.false}) == SCORE + BIAS


def test_keys_of_a_row_whose_scores_are_lost_in_its_bias_weigh_the_same() -> None:
    score = split_logits(SCORE + BIAS, lambda load: TOP if load == BIAS else None)[2]
    lowest = {TOP: LOWEST, BIAS: LOWEST}
    assert {score.expr.subs(lowest).subs(SCORE, s) for s in (-3, 0, 40)} == {sympy.Integer(-(2**20))}


def test_without_its_row_a_bias_hides_only_by_what_no_score_brings_back() -> None:
    predicate, _, _ = split_logits(SCORE + BIAS)
    assert float(predicate.rhs) <= -1e30


@pytest.mark.parametrize(
    ("hidden", "visible", "deep"),
    [
        (SCORE - 10000, SCORE, True),
        (SCORE - 10000, SCORE - 9000, False),
        (SCORE - 1000, SCORE, False),
        (MINUS_INFINITY, SCORE - 9000, True),
        (SCORE + tensor(0)(H) * 3, SCORE, False),
        (SCORE + sympy.exp((KV - Q) * TENTH) - 10000, SCORE, False),
        (SCORE * sympy.exp((KV - Q) * TENTH) - 10000, SCORE, False),
        (SCORE + sympy.exp((KV - Q) * TENTH) + LOWEST, SCORE, True),
        (SCORE + sympy.exp(-sympy.Abs(KV - Q) * TENTH) - 10000, SCORE, True),
        (SCORE + sympy.exp(-(((KV - Q) * TENTH) ** 2)) - 10000, SCORE, True),
    ],
)
def test_a_key_is_hidden_relative_to_a_visible_one(hidden: Any, visible: Any, deep: bool) -> None:
    assert is_deep(hidden, beside=visible) is deep


@pytest.mark.parametrize(
    ("logits", "even"),
    [
        (SCORE + Where(CAUSAL, ZERO, LOWEST), True),
        (Where(CAUSAL, SCORE, sympy.Integer(-10000)), True),
        (SCORE + Where(CAUSAL, ZERO, sympy.Integer(-10000)), False),
        (Where(CAUSAL, SCORE, MINUS_INFINITY), False),
        (SCORE + Where(CAUSAL, ZERO, LOWEST) + Where(WINDOW, ZERO, LOWEST), False),
    ],
)
def test_rows_without_a_key_are_a_mean_where_hidden_scores_are_one_finite_number(logits: Any, even: bool) -> None:
    assert (evenly_hidden(logits, torch.float32, []) is not None) is even
