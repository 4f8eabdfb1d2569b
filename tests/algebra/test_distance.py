"""Biases of the distance keep float32's precision at positions of long prompts."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch

from stem_compile.algebra import symbolic, text
from stem_compile.algebra.distance import by_distance
from stem_compile.algebra.functions import Distance
from stem_compile.algebra.symbolic import KV, KV_LEN, Q_LEN, SCORE, H, Q

S0, SLOPE = symbolic.scalar(0), symbolic.tensor(0)(H)
TENTHS = sympy.Rational(3, 10)
CASES: dict[str, tuple[Any, str]] = {
    "slope": (SCORE + SLOPE * (KV - Q), "s + T0(h)*distance(kv, q)"),
    "slope, prefix": (SCORE + SLOPE * (KV - Q - S0), "s + T0(h)*distance(kv, S0 + q)"),
    "number, prefix": (SCORE + TENTHS * (KV - Q - S0), "s + 3*distance(kv, S0 + q)/10"),
    "square, lengths": (SCORE - (KV - Q - KV_LEN + Q_LEN) ** 2, "s - distance(kv, kv_len + q - q_len)**2"),
    "within": (SCORE * sympy.exp(-((KV - Q) ** 2)), "s*exp(-distance(kv, q)**2)"),
    "two slopes": (SCORE + SLOPE * (KV - Q) + TENTHS * (KV - Q), "s + (T0(h) + 3/10)*distance(kv, q)"),
    "key alone": (SCORE + SLOPE * KV, "s + kv*T0(h)"),
    "sum": (SCORE + SLOPE * (KV + Q), "s + kv*T0(h) + q*T0(h)"),
    "load": (SCORE + symbolic.tensor(1)(KV - Q), "s + T1(kv - q)"),
}


@pytest.mark.parametrize("name", CASES)
def test_sums_of_the_distance_are_written_in_it(name: str) -> None:
    expr, written = CASES[name]
    rewritten = by_distance(symbolic.expand(expr))
    assert rewritten == text.decode(written)
    apart = rewritten.replace(lambda f: isinstance(f, Distance), lambda f: f.args[0] - f.args[1])
    assert symbolic.expand(apart - expr) == 0


@pytest.mark.parametrize("name", ["slope", "square, lengths"])
def test_near_keys_of_a_long_prompt_keep_their_difference(name: str) -> None:
    expr = by_distance(symbolic.expand(CASES[name][0]))
    q = torch.tensor([131_000])
    env = {KV: q - 2, Q: q, Q_LEN: 1 << 17, KV_LEN: 1 << 17, SCORE: torch.zeros(1), H: torch.tensor([0])}
    value = symbolic.evaluate(expr, env | {symbolic.tensor(0): lambda *_: torch.tensor([0.3])})
    expected = {"slope": -0.6, "square, lengths": -4.0}[name]
    assert abs(float(value) - expected) < 1e-6
