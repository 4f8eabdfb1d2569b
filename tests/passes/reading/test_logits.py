"""Logits of any layout are read at (b, h, q, kv)."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from torch import fx

from stem_compile.algebra.symbolic import KV, SCORE, B, H, Q, Where, tensor
from stem_compile.passes.reading.interpret import Interpreter
from stem_compile.passes.reading.logits import read_logits
from stem_compile.passes.reading.unreadable import Unreadable
from tests.passes.by_hand import GraphByHand, randn

BATCH, HEADS, GROUPS, ROWS, KEYS = 2, 4, 2, 5, 6


def _product(g: GraphByHand, *shape: int) -> fx.Node:
    return g.call(torch.matmul, g.given("q", randn(*shape[:-1], 3)), g.given("k", randn(*shape[:-2], 3, shape[-1])))


def _read(source: fx.Node, product: fx.Node, first: int = 0) -> Any:
    interpreter = Interpreter((ROWS, KEYS))
    interpreter.focus({}, {B: BATCH, H: HEADS, Q: ROWS, KV: KEYS})
    return read_logits(source, product, (HEADS, ROWS, KEYS), first, interpreter)


@pytest.mark.parametrize("shape", [(ROWS, KEYS), (BATCH, ROWS, KEYS), (BATCH, HEADS, ROWS, KEYS)])
def test_a_product_is_the_score_at_its_own_place(shape: tuple[int, ...]) -> None:
    g = GraphByHand()
    product = _product(g, *shape)
    assert _read(g.call(torch.mul, product, 0.5), product).expr == SCORE / 2


def test_heads_merged_into_the_batch_are_told_apart() -> None:
    g = GraphByHand()
    product = _product(g, BATCH * HEADS, ROWS, KEYS)
    slopes = g.method("view", g.given("slopes", randn(HEADS)), HEADS, 1, 1)
    logits = g.call(torch.add, g.method("view", product, BATCH, HEADS, ROWS, KEYS), slopes)
    assert _read(logits, product).expr == SCORE + tensor(0)(H)


def test_grouped_heads_are_heads() -> None:
    g = GraphByHand()
    product = _product(g, BATCH, GROUPS, HEADS // GROUPS, ROWS, KEYS)
    slopes = g.method("view", g.given("slopes", randn(HEADS)), GROUPS, HEADS // GROUPS, 1, 1)
    assert _read(g.call(torch.add, product, slopes), product).expr == SCORE + tensor(0)(H)


@pytest.mark.parametrize("in_front", [False, True])
def test_a_column_beside_the_keys_is_a_sink(in_front: bool) -> None:
    g = GraphByHand()
    product = _product(g, BATCH, HEADS, ROWS, KEYS)
    sink = g.method("expand", g.method("view", g.given("sink", randn(HEADS)), 1, HEADS, 1, 1), BATCH, -1, ROWS, 1)
    logits = g.call(torch.cat, [sink, product] if in_front else [product, sink], -1)
    read = _read(logits, product, first=int(in_front))
    assert (read.expr, read.sink) == (SCORE, tensor(0)(H))


def test_a_mask_beside_the_scores_is_a_choice() -> None:
    g = GraphByHand()
    product = _product(g, BATCH, HEADS, ROWS, KEYS)
    rows, keys = (g.call(torch.arange, n) for n in (ROWS, KEYS))
    visible = g.call(torch.le, g.method("unsqueeze", keys, 0), g.method("unsqueeze", rows, 1))
    logits = g.call(torch.where, visible, product, -1e9)
    assert _read(logits, product).expr == Where(KV <= Q, SCORE, sympy.Integer(-(10**9)))


@pytest.mark.parametrize("move", ["flip", "transpose", "roll"])
def test_scores_that_moved_are_unreadable(move: str) -> None:
    g = GraphByHand()
    product = _product(g, BATCH, HEADS, KEYS, KEYS)
    arguments = {"flip": ((-1,),), "transpose": (-1, -2), "roll": (1, -1)}[move]
    interpreter = Interpreter((KEYS,))
    interpreter.focus({}, {B: BATCH, H: HEADS, Q: KEYS, KV: KEYS})
    moved = g.method(move, product, *arguments)
    with pytest.raises(Unreadable):
        read_logits(moved, product, (HEADS, KEYS, KEYS), 0, interpreter)
