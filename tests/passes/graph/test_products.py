"""Every spelling of a product has the same normal form, and an attention's views of it are what was multiplied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from stem_compile.passes.graph.products import contraction, is_product, score_factors, weighted_values
from tests.passes.by_hand import GraphByHand, randn

BATCH, HEADS, ROWS, KEYS, WIDTH = 2, 4, 6, 7, 5
Build = Callable[[GraphByHand, fx.Node, fx.Node], fx.Node]


def _turned(g: GraphByHand, x: fx.Node) -> fx.Node:
    return g.method("transpose", x, -1, -2)


def _einsum(equation: str) -> Build:
    return lambda g, a, b: g.call(torch.einsum, equation, a, b)


def _multiplied(g: GraphByHand, q: fx.Node, k: fx.Node) -> fx.Node:
    wide = g.call(torch.mul, g.method("unsqueeze", q, 3), g.method("unsqueeze", k, 2))
    return g.method("sum", wide, -1)


# name: (shape of queries, shape of keys, product, heads merged into the batch)
SCORES: dict[str, tuple[tuple[int, ...], tuple[int, ...], Build, int | None]] = {
    "matmul": ((2, 4, 6, 5), (2, 4, 7, 5), lambda g, q, k: g.call(torch.matmul, q, _turned(g, k)), None),
    "shared key by broadcasting": (
        (2, 4, 6, 5),
        (2, 1, 7, 5),
        lambda g, q, k: g.call(torch.matmul, q, _turned(g, k)),
        None,
    ),
    "bmm": ((8, 6, 5), (8, 7, 5), lambda g, q, k: g.call(torch.bmm, q, _turned(g, k)), 4),
    "bmm of one head": ((2, 6, 5), (2, 7, 5), lambda g, q, k: g.call(torch.bmm, q, _turned(g, k)), None),
    "mm": ((6, 5), (7, 5), lambda g, q, k: g.call(torch.mm, q, g.method("t", k)), None),
    "linear": ((6, 5), (7, 5), lambda g, q, k: g.call(F.linear, q, k), None),
    "inner": ((6, 5), (7, 5), lambda g, q, k: g.call(torch.inner, q, k), None),
    "tensordot": ((6, 5), (7, 5), lambda g, q, k: g.call(torch.tensordot, q, k, dims=([1], [1])), None),
    "einsum": ((2, 4, 6, 5), (2, 4, 7, 5), _einsum("bhid,bhjd->bhij"), None),
    "einsum, length before heads": ((2, 6, 4, 5), (2, 7, 4, 5), _einsum("b i h d, b j h d -> b h i j"), None),
    "einsum with a shared key": ((2, 4, 6, 5), (2, 7, 5), _einsum("bhid,bjd->bhij"), None),
    "einsum with an ellipsis": ((2, 4, 6, 5), (2, 4, 7, 5), _einsum("...id,...jd->...ij"), None),
    "einsum without an arrow": ((4, 6, 5), (4, 7, 5), _einsum("aik,ajk->aij"), None),
    "einsum by groups": ((2, 2, 2, 6, 5), (2, 2, 7, 5), _einsum("bgrid,bgjd->bgrij"), None),
    "einsum over two dimensions": ((2, 4, 6, 5, 3), (2, 4, 7, 5, 3), _einsum("bhidc,bhjdc->bhij"), None),
    "multiplied and summed": ((2, 4, 6, 5), (2, 4, 7, 5), _multiplied, None),
}


@pytest.mark.parametrize("name", SCORES)
def test_queries_and_keys_are_what_the_product_multiplies(name: str) -> None:
    q_shape, k_shape, build, heads = SCORES[name]
    g = GraphByHand()
    product = build(g, g.given("q", randn(*q_shape, seed=1)), g.given("k", randn(*k_shape, seed=2)))
    factors = score_factors(product, heads)
    assert factors is not None
    queries, keys = (view.apply(view.node.meta["example_value"]) for view in factors)
    assert queries.dim() == keys.dim() == 4
    shared = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    torch.testing.assert_close((queries @ shared.mT).reshape(product.meta["example_value"].shape), _value(product))


# name: (shape of weights, shape of values, product, heads merged into the batch)
VALUES: dict[str, tuple[tuple[int, ...], tuple[int, ...], Build, int | None]] = {
    "matmul": ((2, 4, 6, 7), (2, 4, 7, 5), lambda g, w, v: g.call(torch.matmul, w, v), None),
    "bmm": ((8, 6, 7), (8, 7, 5), lambda g, w, v: g.call(torch.bmm, w, v), 4),
    "mm": ((6, 7), (7, 5), lambda g, w, v: g.call(torch.mm, w, v), None),
    "linear": ((6, 7), (5, 7), lambda g, w, v: g.call(F.linear, w, v), None),
    "einsum, length before heads": ((2, 4, 6, 7), (2, 7, 4, 5), _einsum("bhij,bjhd->bihd"), None),
    "einsum, values first": (
        (2, 4, 6, 7),
        (2, 4, 7, 5),
        lambda g, w, v: g.call(torch.einsum, "bhjd,bhij->bhid", v, w),
        None,
    ),
    "einsum with a shared value": ((2, 4, 6, 7), (2, 7, 5), _einsum("bhij,bjd->bhid"), None),
    "einsum by groups": ((2, 2, 2, 6, 7), (2, 2, 7, 5), _einsum("bgrij,bgjd->bigrd"), None),
    "einsum with an ellipsis": ((2, 4, 6, 7), (2, 4, 7, 5), _einsum("...ij,...jd->...id"), None),
}


@pytest.mark.parametrize("name", VALUES)
def test_weighted_values_come_back_in_the_products_layout(name: str) -> None:
    w_shape, v_shape, build, heads = VALUES[name]
    g = GraphByHand()
    weights, v = g.given("w", randn(*w_shape, seed=1)), g.given("v", randn(*v_shape, seed=2))
    product = build(g, weights, v)
    parts = weighted_values(product, weights, heads)
    assert parts is not None
    values = parts[0].apply(_value(v))
    four = _value(weights).reshape(-1, HEADS, ROWS, KEYS) if len(w_shape) > 2 else _value(weights)[None, None]
    result = four @ values.repeat_interleave(four.shape[1] // values.shape[1], 1)
    for step, arguments in parts[1]:
        result = getattr(result, step)(*arguments)
    torch.testing.assert_close(result, _value(product))


# name: (shapes, product): nothing that an attention could be made of.
OTHERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Build]] = {
    "an outer product": ((6,), (7,), _einsum("i,j->ij")),
    "a letter twice": ((6, 6), (6, 7), _einsum("ii,ij->ij")),
    "one side summed": ((6, 5), (5, 7), _einsum("ik,kj->j")),
    "elementwise": ((6, 5), (6, 5), lambda g, a, b: g.call(torch.mul, a, b)),
    "an entropy": ((6, 5), (6, 5), lambda g, a, b: g.method("sum", g.call(torch.mul, a, b), -1)),
    "a vector": ((6, 5), (5,), lambda g, a, b: g.call(torch.matmul, a, b)),
    "a mean": ((6, 5), (6, 5), lambda g, a, b: g.method("mean", g.call(torch.mul, a, b), -1)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_product_of_two_tensors_has_no_form(name: str) -> None:
    a_shape, b_shape, build = OTHERS[name]
    g = GraphByHand()
    assert not is_product(build(g, g.given("a", randn(*a_shape)), g.given("b", randn(*b_shape))))


def test_a_bias_is_no_part_of_a_product() -> None:
    g = GraphByHand()
    x, w, bias = g.given("x", randn(6, 5)), g.given("w", randn(7, 5)), g.given("bias", randn(7))
    assert contraction(g.call(F.linear, x, w, bias)) is None


def test_heads_that_keys_have_and_queries_have_not_are_refused() -> None:
    g = GraphByHand()
    q, k = g.given("q", randn(BATCH, 1, ROWS, WIDTH)), g.given("k", randn(BATCH, HEADS, KEYS, WIDTH))
    assert score_factors(g.call(torch.matmul, q, _turned(g, k)), None) is None


def _value(node: fx.Node) -> Any:
    return node.meta["example_value"]
