"""Every reader: what it reads of an operation is what torch computes, at every place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import fx

from stem_compile.passes.graph import normalize
from stem_compile.passes.reading.interpret import Interpreter, readers
from stem_compile.passes.reading.unreadable import Unreadable
from stem_compile.testing.tolerances import PRINTED
from tests.numerics import assert_close
from tests.passes.by_hand import GraphByHand
from tests.passes.reading.reading import boundless, evaluated

Build = Callable[[GraphByHand, fx.Node, fx.Node], fx.Node]
"""A node made of whole numbers i [5, 1] and j [1, 6]."""


def _mask(g: GraphByHand, i: fx.Node, j: fx.Node) -> fx.Node:
    return g.call(torch.le, j, i)


def _bias(g: GraphByHand, i: fx.Node, j: fx.Node) -> fx.Node:
    """0 where j <= i, else -inf."""
    return g.call(torch.where, _mask(g, i, j), 0.0, -torch.inf)


def _half(g: GraphByHand, i: fx.Node, j: fx.Node) -> fx.Node:
    """Halves between -2.5 and 2."""
    return g.call(torch.mul, g.call(torch.sub, i, j), 0.5)


def _method(name: str, *arguments: object, of: Build = _half, **keywords: object) -> Build:
    return lambda g, i, j: g.method(name, of(g, i, j), *arguments, **keywords)


def _both(function: Callable[..., torch.Tensor]) -> Build:
    return lambda g, i, j: g.call(function, i, j)


def _conditions(function: Callable[..., torch.Tensor]) -> Build:
    return lambda g, i, j: g.call(function, _mask(g, i, j), g.call(torch.gt, i, 2))


READ: dict[str, list[Build]] = {
    "arange": [lambda g, i, j: g.call(torch.arange, 9), lambda g, i, j: g.call(torch.arange, 3, 20, 4)],
    "ones": [lambda g, i, j: g.call(torch.ones, 3, 4)],
    "zeros": [lambda g, i, j: g.call(torch.zeros, (3, 4), dtype=torch.bool)],
    "full": [lambda g, i, j: g.call(torch.full, (3, 4), 0.1)],
    "new_ones": [_method("new_ones", (2, 3))],
    "new_zeros": [_method("new_zeros", (2, 3))],
    "new_full": [_method("new_full", (2, 3), 7.5)],
    "ones_like": [lambda g, i, j: g.call(torch.ones_like, _half(g, i, j))],
    "zeros_like": [lambda g, i, j: g.call(torch.zeros_like, _mask(g, i, j))],
    "full_like": [lambda g, i, j: g.call(torch.full_like, _half(g, i, j), -torch.inf)],
    "tensor": [lambda g, i, j: g.call(torch.tensor, 2.5)],
    "scalar_tensor": [lambda g, i, j: g.call(torch.scalar_tensor, 2.5)],
    "tril": [_method("tril"), _method("tril", 2, of=_mask)],
    "triu": [_method("triu", diagonal=-1), _method("triu", of=_mask)],
    **{
        name: [_both(getattr(torch, name)), _method(name, 0.25)]
        for name in ("le", "lt", "ge", "gt", "eq", "ne")
    },
    "and": [_conditions(torch.logical_and), _conditions(torch.bitwise_and)],
    "or": [_conditions(torch.logical_or)],
    "xor": [_conditions(torch.logical_xor)],
    "not": [_method("logical_not", of=_mask), _method("logical_not", of=_half)],
    "add": [_both(torch.add), lambda g, i, j: g.call(torch.add, i, j, alpha=3)],
    "sub": [_both(torch.sub)],
    "mul": [_both(torch.mul), _conditions(torch.mul)],
    "truediv": [_method("div", 4), lambda g, i, j: g.call(torch.div, i, 2, rounding_mode="floor")],
    "floordiv": [lambda g, i, j: g.call(torch.floor_divide, i, 2)],
    "mod": [lambda g, i, j: g.call(torch.remainder, g.call(torch.sub, i, j), 3)],
    "neg": [_method("neg")],
    "abs": [_method("abs")],
    "max": [_both(torch.max)],
    "minimum": [_both(torch.minimum), lambda g, i, j: g.call(torch.minimum, _bias(g, i, j), _bias(g, j, i))],
    "maximum": [_both(torch.maximum), lambda g, i, j: g.call(torch.maximum, _bias(g, i, j), _bias(g, j, i))],
    "clamp": [_method("clamp", -1, 1), _method("clamp", min=0)],
    "where": [
        lambda g, i, j: g.call(torch.where, _mask(g, i, j), i, j),
        lambda g, i, j: g.method("where", i, _mask(g, i, j), j),
    ],
    "masked_fill": [lambda g, i, j: g.method("masked_fill", _half(g, i, j), _mask(g, i, j), -torch.inf)],
    "tanh": [_method("tanh")],
    "exp": [_method("exp"), _method("exp", of=_bias)],
    "log": [lambda g, i, j: g.method("log", g.method("tril", g.call(torch.ones, 4, 4)))],
    "sqrt": [lambda g, i, j: g.method("sqrt", g.call(torch.add, i, j))],
    "rsqrt": [lambda g, i, j: g.method("rsqrt", g.call(torch.add, i, 1))],
    "pow": [_method("pow", 2), lambda g, i, j: g.method("pow", g.call(torch.add, i, 1), -0.5)],
    "relu": [_method("relu")],
    "square": [_method("square")],
    "reciprocal": [lambda g, i, j: g.method("reciprocal", g.call(torch.add, i, 1))],
    "log1p": [lambda g, i, j: g.method("log1p", g.call(torch.add, i, j))],
    "expm1": [_method("expm1")],
    "sigmoid": [_method("sigmoid"), _method("sigmoid", of=_bias)],
    "silu": [lambda g, i, j: g.call(F.silu, _half(g, i, j))],
    "leaky_relu": [lambda g, i, j: g.call(F.leaky_relu, _half(g, i, j), 0.2)],
    "hardtanh": [lambda g, i, j: g.call(F.hardtanh, _half(g, i, j))],
    "nan_to_num": [_method("nan_to_num", of=_bias), _method("nan_to_num", neginf=-5.0, of=_bias)],
    "contiguous": [_method("contiguous")],
    "clone": [_method("clone")],
    "detach": [_method("detach")],
    "alias": [lambda g, i, j: g.call(torch.ops.aten.alias.default, i)],
    "to": [_method("to", torch.float64), _method("to", torch.bool, of=_half)],
    "type": [_method("type", torch.float64)],
    "type_as": [lambda g, i, j: g.method("type_as", _mask(g, i, j), i)],
    **{name: [_method(name, of=_mask)] for name in ("bool", "long", "int", "float", "half", "double", "bfloat16")},
    "dropout": [lambda g, i, j: g.call(F.dropout, _half(g, i, j), 0.5, False)],
    "unsqueeze": [_method("unsqueeze", 1), _method("unsqueeze", -1)],
    "transpose": [_method("transpose", 0, -1)],
    "t": [_method("t")],
    "permute": [_method("permute", 1, 0)],
    "getitem": [
        lambda g, i, j: g.call(_getitem, _half(g, i, j), (slice(1, None), None, slice(0, 6, 2))),
        lambda g, i, j: g.call(_getitem, _half(g, i, j), (Ellipsis, -2)),
    ],
    "select": [_method("select", 0, -1)],
    "narrow": [_method("narrow", 1, 2, 3)],
    "flip": [_method("flip", (0, 1))],
    "expand": [lambda g, i, j: g.method("expand", i, 3, 5, 6)],
    "expand_as": [lambda g, i, j: g.method("expand_as", i, _half(g, i, j))],
    "repeat": [lambda g, i, j: g.method("repeat", i, 2, 1, 3)],
    "cat": [
        lambda g, i, j: g.call(torch.cat, [_half(g, i, j), _half(g, i, j)], 1),
        lambda g, i, j: g.call(torch.cat, [_mask(g, i, j), _mask(g, i, j)]),
    ],
    "stack": [lambda g, i, j: g.call(torch.stack, [_half(g, i, j)], 1)],
    "pad": [
        lambda g, i, j: g.call(F.pad, _half(g, i, j), (2, 1)),
        lambda g, i, j: g.call(F.pad, _mask(g, i, j), (1, 0, 0, 2), value=True),
        lambda g, i, j: g.call(F.pad, _half(g, i, j), (-1, 2, 1, -2), value=-torch.inf),
    ],
    **{name: [_method(name, (3, 10))] for name in ("view", "reshape")},
    "squeeze": [lambda g, i, j: g.method("squeeze", i, 1)],
    "flatten": [_method("flatten")],
    "unflatten": [_method("unflatten", 1, (2, 3))],
    "view_as": [lambda g, i, j: g.method("view_as", _half(g, i, j), g.call(torch.zeros, 10, 3))],
    "reshape_as": [lambda g, i, j: g.method("reshape_as", _half(g, i, j), g.call(torch.zeros, 10, 3))],
    "diff": [
        lambda g, i, j: g.call(torch.diff, g.call(torch.mul, j, 3)),
        lambda g, i, j: g.call(torch.diff, j, prepend=g.call(_getitem, j, (slice(None), slice(0, 1)))),
    ],
    "cumsum": [lambda g, i, j: g.method("cumsum", g.call(torch.ones, 4, 5, dtype=torch.long), -1)],
    "fill": [lambda g, i, j: g.call(torch.fill, i, 3)],
    "zero": [lambda g, i, j: g.call(torch.ops.aten.zero.default, i)],
}  # fmt: skip
CASES = [(name, n) for name, builds in READ.items() for n in range(len(builds))]


def _getitem(x: torch.Tensor, index: object) -> torch.Tensor:
    return x[index]  # type: ignore[index]


def _given(g: GraphByHand) -> tuple[fx.Node, fx.Node]:
    i, j = (g.call(torch.arange, n) for n in (5, 6))
    return g.method("unsqueeze", i, 1), g.method("unsqueeze", j, 0)


@pytest.mark.parametrize(("name", "number"), CASES, ids=[f"{name}-{n}" for name, n in CASES])
def test_what_is_read_is_what_torch_computes(name: str, number: int) -> None:
    g = GraphByHand()
    node = READ[name][number](g, *_given(g))
    assert_close(evaluated(node), boundless(node.meta["example_value"]), PRINTED, torch.float32)


def test_every_reader_is_read() -> None:
    assert set(readers()) <= set(READ), set(readers()) - set(READ)


UNREAD: dict[str, Build] = {
    "dropout": lambda g, i, j: g.call(F.dropout, _half(g, i, j), 0.5, True),
    "float to int": _method("long"),
    "arange of floats": lambda g, i, j: g.call(torch.arange, 0, 2, 0.5),
    "division that truncates": lambda g, i, j: g.call(torch.div, i, 2, rounding_mode="trunc"),
    "bitwise and of integers": _both(torch.bitwise_and),
    "a logarithm of a negative number": lambda g, i, j: g.method("log", g.call(torch.full, (3, 3), -1.0)),
    "padding by reflection": lambda g, i, j: g.call(F.pad, _half(g, i, j), (1, 1), mode="reflect"),
    "diff of conditions": lambda g, i, j: g.call(torch.diff, _mask(g, i, j)),
    "zero over zero": lambda g, i, j: g.call(torch.div, g.call(torch.zeros, 3, 3), g.call(torch.zeros, 3, 3)),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_has_no_words_is_unreadable(name: str) -> None:
    g = GraphByHand()
    node = UNREAD[name](g, *_given(g))
    op = normalize.read(node)
    assert op is not None
    with pytest.raises(Unreadable):
        readers()[op.name](Interpreter(), op, node.meta["example_value"]).at(sympy.symbols("p q"))
