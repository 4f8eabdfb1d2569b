"""A function and the method of its name are one operation with the same arguments, as torch's own schemas bind them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stem_compile.passes.graph import normalize, schemas
from tests.passes.by_hand import GraphByHand, randn

X, Y, FLAGS = randn(3, 4, seed=1), randn(3, 4, seed=2), torch.arange(12).view(3, 4) % 2 == 0
WHOLE = torch.arange(12).view(3, 4)
# Arguments of each function of the vocabulary that is a method too, in the function's order.
CALLS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("add", "sub", "mul", "div", "true_divide", "minimum", "maximum", "max"), (X, Y)),
    **dict.fromkeys(("le", "lt", "ge", "gt", "eq", "ne", "less", "greater_equal", "not_equal"), (X, Y)),
    **dict.fromkeys(("floor_divide", "remainder", "bitwise_and", "bitwise_or", "bitwise_xor"), (WHOLE, WHOLE + 1)),
    **dict.fromkeys(("logical_and", "logical_or", "logical_xor"), (FLAGS, FLAGS.T.reshape(3, 4))),
    **dict.fromkeys(("neg", "abs", "exp", "tanh", "sigmoid", "relu", "nan_to_num", "clone", "detach", "t"), (X,)),
    **dict.fromkeys(("log", "sqrt", "rsqrt", "square", "reciprocal", "log1p", "expm1"), (X.abs() + 1,)),
    **dict.fromkeys(("logical_not", "bitwise_not"), (FLAGS,)),
    **dict.fromkeys(("tril", "triu", "cumsum", "softmax", "log_softmax", "unsqueeze", "squeeze", "sum"), (X, 0)),
    **dict.fromkeys(("amax", "logsumexp", "all", "any"), (X, 1)),
    "numel": (X,),
    "flip": (X, (0,)),
    "where": (FLAGS, X, Y),
    "masked_fill": (X, FLAGS, 2.0),
    "clamp": (X, -0.5, 0.5),
    "pow": (X, 2),
    "transpose": (X, 0, 1),
    "permute": (X, (1, 0)),
    "reshape": (X, (4, 3)),
    "flatten": (X, 0, 1),
    "unflatten": (X, 1, (2, 2)),
    "repeat_interleave": (X, 2, 1),
    "select": (X, 1, 2),
    "narrow": (X, 1, 1, 2),
    "diff": (X, 1, 0),
    "matmul": (X, Y.T),
    "mm": (X, Y.T),
    "inner": (X, Y),
    "bmm": (X[None], Y.T[None]),
    "baddbmm": (randn(1, 3, 3), X[None], Y.T[None]),
    "addmm": (randn(3, 3), X, Y.T),
    "broadcast_to": (X, (2, 3, 4)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_function_and_its_method_are_one_operation(name: str) -> None:
    g = GraphByHand()
    arguments = tuple(g.given(f"x{n}", a) if isinstance(a, torch.Tensor) else a for n, a in enumerate(CALLS[name]))
    place = schemas.receiver_place(name)
    as_method = (arguments[place], *arguments[:place], *arguments[place + 1 :])
    function, method = g.call(getattr(torch, name), *arguments), g.method(name, *as_method)
    unbound = g.call(getattr(torch.Tensor, name), *as_method)
    assert normalize.read(function) is not None
    assert normalize.read(function) == normalize.read(method) == normalize.read(unbound)
    torch.testing.assert_close(function.meta["example_value"], method.meta["example_value"])


def test_every_operation_with_a_method_is_compared() -> None:
    known = {normalize._ALIASES.get(name, name) for name in CALLS}
    methods = {n for n in normalize.SIGNATURES if callable(getattr(torch, n, None)) and hasattr(torch.Tensor, n)}
    assert methods <= known, methods - known


def test_keywords_are_those_of_torchs_schemas() -> None:
    g = GraphByHand()
    a, b = g.given("a", X[None]), g.given("b", Y.T[None])
    assert normalize.read(g.call(torch.bmm, a, mat2=b)) == normalize.read(g.call(torch.bmm, a, b))
    assert normalize.read(g.call(torch.bmm, input=a, mat2=b)) == normalize.read(g.method("bmm", a, b))


def test_a_view_as_another_dtype_is_no_view() -> None:
    g = GraphByHand()
    x = g.given("x", X)
    assert normalize.read(g.method("view", x, torch.int32)) is None
    assert normalize.read(g.method("view", x, dtype=torch.int32)) is None
    assert normalize.read(g.method("view", x, 4, 3)) is not None


def test_functions_of_torch_nn_are_known() -> None:
    g = GraphByHand()
    op = normalize.read(g.call(F.linear, g.given("x", X), weight=g.given("w", Y)))
    assert op is not None
    assert op.name == "linear"
