"""The interpreter: what becomes a load, what is refused, and how an operation is taught from outside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sympy
import torch

from stem_compile.algebra import symbolic
from stem_compile.algebra.symbolic import KV, Q
from stem_compile.passes.graph import normalize
from stem_compile.passes.graph.values import View
from stem_compile.passes.reading.interpret import Interpreter, elementwise, register_reader, unregister_reader
from stem_compile.passes.reading.unreadable import Unreadable
from tests.passes.by_hand import GraphByHand, randn
from tests.passes.reading.reading import evaluated

N = 6


def test_a_vector_that_is_not_understood_is_a_load() -> None:
    g = GraphByHand()
    slopes = g.call(torch.sin, g.given("slopes", randn(N)))
    interpreter = Interpreter()
    assert interpreter.tensor(slopes).at((Q,)) == symbolic.tensor(0)(Q)
    assert interpreter.leaves == [slopes]


def test_a_square_that_is_not_understood_is_a_load_only_where_asked_for() -> None:
    g = GraphByHand()
    square = g.call(torch.sin, g.given("scores", randn(1, N, N)))
    with pytest.raises(Unreadable, match="sin"):
        Interpreter().tensor(square)
    assert Interpreter(opaque=True).tensor(square).at((sympy.Integer(0), Q, KV)) == symbolic.tensor(0)(0, Q, KV)


def test_what_is_computed_from_a_given_value_is_never_a_load() -> None:
    g = GraphByHand()
    product = g.given("product", randn(1, N, N))
    interpreter = Interpreter(opaque=True)
    interpreter.focus({product: interpreter.tensor(1.0)}, {})
    with pytest.raises(Unreadable):
        interpreter.tensor(g.call(torch.sin, product))


def test_the_greatest_of_a_row_is_a_load_of_its_own() -> None:
    g = GraphByHand()
    bias = g.given("bias", randn(2, 1, N, N))
    interpreter = Interpreter((N,), extents={Q: N, KV: N}, opaque=True)
    load = interpreter.tensor(bias).at((sympy.Integer(1), sympy.Integer(0), Q, KV))
    assert interpreter.row_maximum(load) == symbolic.tensor(1)(1, 0, Q, 0)
    assert interpreter.leaves[1] == View(bias, (("amax", (-1, True)),))
    assert interpreter.row_maximum(load.subs(KV, KV + 1)) is None


def test_what_sympy_cannot_compare_is_unreadable() -> None:
    g = GraphByHand()
    imaginary = g.call(torch.pow, g.call(torch.full, (1, N, N), -1.0), 0.3)
    with pytest.raises(Unreadable):
        Interpreter().tensor(g.call(torch.lt, imaginary, 1.0)).at((sympy.Integer(0), Q, KV))


class Halved(sympy.Function):  # type: ignore[misc]
    """A function of one number, as a third party may bring it."""

    nargs = (1,)

    @classmethod
    def eval(cls, x: sympy.Expr) -> sympy.Expr:
        return x / 2


@pytest.fixture
def _frac() -> Iterator[None]:
    register_reader("sin", elementwise(Halved), normalize.signature("input"))
    yield
    unregister_reader("sin")
    del normalize.SIGNATURES["sin"]


@pytest.mark.usefixtures("_frac")
def test_an_operation_is_taught_by_one_call() -> None:
    g = GraphByHand()
    node = g.call(torch.sin, g.call(torch.arange, N))
    node.meta["example_value"] = torch.arange(N) / 2
    torch.testing.assert_close(evaluated(node), torch.arange(N) / 2)


def test_a_reader_is_registered_once_and_with_a_signature() -> None:
    with pytest.raises(ValueError, match="has a reader"):
        register_reader("tanh", elementwise(sympy.tanh))
    with pytest.raises(ValueError, match="signature"):
        register_reader("erf", elementwise(sympy.erf))
