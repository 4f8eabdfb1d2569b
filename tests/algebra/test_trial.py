"""The trial: masks and scores that would fail at run time are told at compile time, the others pass."""

from __future__ import annotations

import time
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_compile.algebra import functions, masks, trial
from stem_compile.algebra.functions import BOOLEAN, REAL, Function
from stem_compile.algebra.symbolic import SCORE
from stem_compile.kernels.triton import codegen
from tests.algebra.test_functions import expressions
from tests.kernels.kernel_cases import EDGED, MASKS, SCORES

FLOAT, IDS, FLAGS = torch.float32, torch.int64, torch.bool
TENSORS: dict[str, tuple[trial.StandIn, ...]] = {
    "Ne(T0(b, kv), 0)": ((FLAGS, (2, None)),),
    "Eq(T0(b, q), T0(b, kv))": ((IDS, (2, None)),),
    "T0(b)": ((IDS, (2,)),),
    "T0()": ((IDS, ()),),
    "T0(b, 0, q, kv)": ((FLAGS, (2, 1, None, None)),),
}


def stand_ins(mask: str) -> tuple[trial.StandIn, ...]:
    return next((t for piece, t in TENSORS.items() if piece in mask), ())


@pytest.mark.parametrize("mask", [*MASKS, *EDGED])
def test_masks_of_kernels_pass(mask: str) -> None:
    text = masks.encode(masks.decode(mask))
    assert trial.failure(text, "", stand_ins(mask), 1, (codegen.printed,)) is None


@pytest.mark.parametrize("kind", SCORES)
def test_scores_of_kernels_pass(kind: str) -> None:
    shapes = {"T#()": (), "T#(h)": (4,), "T#(0, h, q, kv)": (1, 4, None, None)}
    tensors = [(FLOAT, shape) for piece, shape in shapes.items() if piece in kind]
    assert trial.failure("kv <= q", kind.replace("#", "0"), tensors, 0, (codegen.printed,)) is None


@pytest.mark.parametrize(
    "mask",
    [
        "(kv <= q) | (kv < FloorDiv(q_len, 2))",
        "(kv <= q) | (kv < FloorDiv(q_len + 63, 64)*64)",
        "(kv <= q) | (kv < FloorDiv(q_len, 4))",
        "(kv <= q) & Xor(kv < 5, q < 7)",
        "(kv <= q) & (kv < sqrt(q_len)*5)",
        "(kv <= q) & (FloorDiv(kv - q, 3) > -4)",
        "(kv <= q) & (Mod(kv - q, 3) > 0)",
        "(kv <= q) & (fp32(fp32(0.019999999552965164*q) - fp32(0.019999999552965164*kv)) <= 0.5)",
        "(kv <= q) & (i32(q*100000000 + kv) > 0)",
        "FloorDiv(q, 16) >= FloorDiv(kv, 16)",
        "(kv <= q) & (q_len > 25)",
        "(kv <= q) & (h < 1)",
    ],
)
def test_masks_in_lengths_pass(mask: str) -> None:
    assert trial.failure(masks.encode(masks.decode(mask)), "", (), 0, (codegen.printed,)) is None


@pytest.mark.parametrize(
    "score",
    [
        "s/(Max(0, q - kv) + 1)",
        "s + 1/(Max(0, q - kv) + 1)",
        "s/(q + 1)",
        "s + exp((kv - q)/2)",
        "s*exp((kv - q)/2)",
        "s + exp(-(q - kv)**2/400)",
        "s*log(q_len)",
        "s + Max(-1, Min(1, s))**3",
    ],
)
def test_scores_with_division_and_exponentials_pass(score: str) -> None:
    assert trial.failure("kv <= q", score, (), 0, (codegen.printed,)) is None


@pytest.mark.parametrize(
    ("mask", "score", "why"),
    [
        ("kv <= FloorDiv(q, kv_len - q_len)", "", "ZeroDivision"),
        ("kv <= q + T1(b)", "", "KeyError"),
        ("kv <= q", "s + log(kv - 5)", "NaN"),
        ("kv <= q", "s ; sink T0(q)", "no name here"),
        ("kv <= q", "s + row", "row has no value"),
        ("kv <= nonsense", "", "not an encoded mask"),
        ("kv + 1", "", "of torch.int64"),
    ],
)
def test_what_would_fail_at_run_time_is_told(mask: str, score: str, why: str) -> None:
    failure = trial.failure(mask, score, ((IDS, (2,)),), 0, (codegen.printed,))
    assert failure is not None
    assert why in failure


@settings(max_examples=15)
@given(st.data())
def test_what_the_table_gives_passes(data: Any) -> None:
    """Bounds and torch agree on whatever conditions the rows can make."""
    rows: list[Function] = [r for r in functions.table() if r.gives is BOOLEAN]
    predicate = data.draw(expressions(BOOLEAN, 2, data.draw(st.sampled_from(rows))))
    tensors = ((IDS, (2, None)), (FLOAT, (2,)))
    if not predicate.has(SCORE) and predicate not in (sympy.true, sympy.false):
        mask = masks.encode(masks.predicate(predicate))
        assert trial.failure(mask, "", tensors, 1, (codegen.printed,)) in (None, "ZeroDivisionError: ZeroDivisionError")


def test_a_bound_that_loses_keys_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    row = functions.by_name()["Xor"]
    object.__setattr__(row, "bounds", lambda *parts: (False, False))
    try:
        trial._failure.cache_clear()
        assert "lose visible keys" in str(trial.failure("Xor(kv < 5, kv < q)", ""))
    finally:
        from stem_compile.algebra import intervals

        object.__setattr__(row, "bounds", intervals.exclusive)
        trial._failure.cache_clear()


def test_a_text_is_tried_once() -> None:
    trial._failure.cache_clear()
    for _ in range(32):
        trial.failure("kv <= q", "s + T0(h)*(kv - q)", [(FLOAT, (4,))], 0, (codegen.printed,))
    assert trial._failure.cache_info().misses == 1
    assert REAL is not BOOLEAN
    start = time.perf_counter()
    trial.failure("(kv <= q) & (kv > q - 90)", "", [], 0, (codegen.printed,))
    assert time.perf_counter() - start < 1
