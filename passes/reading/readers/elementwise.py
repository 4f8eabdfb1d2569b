"""Elementwise operations: comparison, logic, arithmetic, choice."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from stem_compile.algebra import symbolic
from stem_compile.algebra.symbolic import FloorDiv, Where
from stem_compile.passes.graph.normalize import Op
from stem_compile.passes.graph.values import value
from stem_compile.passes.reading import exact
from stem_compile.passes.reading.expressions import CASES, HIDDEN, as_expr, boolean, by_cases, decided, loads, number
from stem_compile.passes.reading.interpret import Interpreter, Reader, SymTensor, elementwise
from stem_compile.passes.reading.unreadable import Unreadable

DEEPEST = 200
"""Exponent from which an exponential is zero or infinity in every dtype that attention is computed in."""


def _compare(name: str) -> Reader:
    relation = {"le": sympy.Le, "lt": sympy.Lt, "ge": sympy.Ge, "gt": sympy.Gt, "eq": sympy.Eq, "ne": sympy.Ne}[name]

    def compare(a: Any, b: Any) -> Any:
        a, b = number(a), number(b)
        return decided(lambda n: relation(n, b), a) if b.is_number else relation(a, b)

    def read(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
        sides = [i.tensor(op[side]) for side in ("input", "other")]
        if not all(side.exact for side in sides):
            raise Unreadable("a comparison of numbers that the graph rounds")
        values = [value(op[side]) for side in ("input", "other")]
        dtype = torch.result_type(*(_plain(x) for x in values))
        if not dtype.is_floating_point:
            return i.map(compare, op["input"], op["other"])
        # Integers are compared with floats in the floats' dtype.
        if not all(side.kind != "int" or i.fits(side, dtype) for side in sides):
            raise Unreadable(f"integers compared in {dtype}")
        return i.map(lambda a, b: compare(*(exact.rounded(number(x), dtype) for x in (a, b))), op["input"], op["other"])

    return read


def _plain(x: Any) -> Any:
    """A tensor, or a number of the kind that a symbolic one is."""
    return 0.5 if isinstance(x, torch.SymFloat) else 1 if isinstance(x, torch.SymInt) else x


def _logic(connective: Any) -> Reader:
    def read(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
        if known.dtype != torch.bool:
            raise Unreadable(f"bitwise {op.name} of integers")
        return i.map(lambda a, b: connective(boolean(a), boolean(b)), op["input"], op["other"])

    return read


def _of_choices(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function; of numbers and choices between numbers, the choice between its values."""

    def of(*exprs: Any) -> Any:
        exprs = tuple(sympy.sympify(number(e)) for e in exprs)
        return by_cases(function, *exprs) if all(map(_is_number_in_each_case, exprs)) else function(*exprs)

    return of


def _is_number_in_each_case(expr: Any) -> bool:
    """Whether an expression is a number in each case of its choices."""
    if isinstance(expr, Where):
        return all(_is_number_in_each_case(end) for end in expr.args[1:])
    choices = {e: sympy.Integer(1) for e in expr.atoms(Where)}
    return bool(expr.xreplace(choices).is_number) and all(map(_is_number_in_each_case, choices))


def _binary(function: Callable[[Any, Any], Any]) -> Reader:
    return elementwise(_of_choices(function), "input", "other")


def _divided(a: Any, b: Any) -> Any:
    if b != 0:
        return a / b
    if a == 0 or not a.is_number:
        raise Unreadable("a division by zero")
    return _infinite(a > 0)


def _infinite(positive: Any) -> Any:
    return sympy.Rational(-HIDDEN if positive else HIDDEN)


def _log(a: Any) -> Any:
    if a.is_number and a < 0:
        raise Unreadable("a logarithm of a negative number")
    return _infinite(False) if a == 0 else sympy.log(a)


def _exp(a: Any) -> Any:
    if not a.is_Rational:
        return sympy.exp(a)
    return _infinite(True) if a > DEEPEST else sympy.Integer(0) if a < -DEEPEST else as_expr(math.exp(float(a)))


def _root(power: int) -> Callable[[Any], Any]:
    """x ** 0.5 or x ** -0.5."""

    def root(a: Any) -> Any:
        if a.is_number and a < 0:
            raise Unreadable("a root of a negative number")
        return _infinite(True) if a == 0 and power < 0 else a ** sympy.Rational(power, 2)

    return root


def _sigmoid(a: Any) -> Any:
    return 1 / (1 + _exp(-a))


def _leaky_relu(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    slope = as_expr(value(op["negative_slope"]))
    return elementwise(lambda a: by_cases(lambda x: sympy.Max(x, 0) + slope * sympy.Min(x, 0), a))(i, op, known)


def _hardtanh(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    low, high = (as_expr(value(op[side])) for side in ("min_val", "max_val"))
    return elementwise(lambda a: by_cases(lambda x: sympy.Min(sympy.Max(x, low), high), a))(i, op, known)


def _nan_to_num(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    """Infinities become the ends of the dtype. Scores are finite, and so is what positions make."""
    ends = [op["neginf"], op["posinf"]]
    limits = torch.finfo(known.dtype) if known.dtype.is_floating_point else None
    if limits is None:
        return i.tensor(op["input"])
    low, high = (as_expr(value(e if e is not None else x)) for e, x in zip(ends, (limits.min, limits.max)))

    def finite(expr: Any) -> Any:
        constant, _ = symbolic.expand(expr).as_coeff_Add()
        return (
            low if constant <= sympy.Rational(HIDDEN) / 2 else high if constant >= -sympy.Rational(HIDDEN) / 2 else expr
        )

    def read(a: Any) -> Any:
        a = sympy.sympify(number(a))
        if loads(a):
            raise Unreadable("nan_to_num of what only the run knows")
        if len(a.atoms(Where)) > CASES:
            raise Unreadable("nan_to_num of many choices")
        return by_cases(finite, a)

    return i.map(read, op["input"])


def _scaled(sign: int) -> Reader:
    def read(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
        alpha = sign * as_expr(value(op["alpha"]))
        if known.dtype == torch.bool:
            raise Unreadable(f"{op.name} of conditions")
        return i.map(lambda a, b: number(a) + alpha * number(b), op["input"], op["other"])

    return read


def _mul(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    if known.dtype == torch.bool:
        return i.map(lambda a, b: sympy.And(boolean(a), boolean(b)), op["input"], op["other"])
    return i.map(lambda a, b: number(a) * number(b), op["input"], op["other"])


def _not(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    if known.dtype != torch.bool:
        raise Unreadable("bitwise not of integers")
    return i.map(lambda a: sympy.Not(boolean(a)), op["input"])


def _whole(function: Any) -> Reader:
    def read(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
        divisor = op["other"]
        if isinstance(divisor, int) and divisor > 0 and i.tensor(op["input"]).kind == "int":
            return i.map(lambda a: function(number(a), sympy.Integer(divisor)), op["input"])
        raise Unreadable("division by something other than a positive constant")

    return read


def _truediv(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    if op["rounding_mode"] == "floor":
        return _whole(FloorDiv)(i, op, known)
    if op["rounding_mode"] is not None:
        raise Unreadable("division that truncates")
    return _binary(_divided)(i, op, known)


def _where(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    def choose(c: Any, a: Any, b: Any) -> Any:
        c = boolean(c)
        if known.dtype == torch.bool:
            return sympy.Or(sympy.And(c, boolean(a)), sympy.And(sympy.Not(c), boolean(b)))
        return Where(c, number(a), number(b))

    return i.map(choose, op["condition"], op["input"], op["other"])


def _masked_fill(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    return _where(i, Op("where", {"condition": op["mask"], "input": op["value"], "other": op["input"]}), known)


def _greatest(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    if not isinstance(op["dim"], fx.Node) or not isinstance(value(op["dim"]), torch.Tensor):
        raise Unreadable("a maximum over elements")
    return elementwise(_of_choices(sympy.Max), "input", "dim")(i, op, known)


def _clamp(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    bounds = [(f, op[side]) for f, side in ((sympy.Max, "min"), (sympy.Min, "max")) if op[side] is not None]

    def read(a: Any, *limits: Any) -> Any:
        for (function, _), limit in zip(bounds, limits, strict=True):
            a = _of_choices(function)(a, limit)
        return a

    return i.map(read, op["input"], *(limit for _, limit in bounds))


def _pow(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    exponent = value(op["exponent"])
    if not isinstance(exponent, int | float):
        raise Unreadable("a power with a tensor exponent")
    if isinstance(exponent, float) and not exponent.is_integer() and abs(exponent) != 0.5:
        return elementwise(_of_choices(lambda a: a ** as_expr(exponent)))(i, op, known)
    power = (lambda a: a ** int(exponent)) if float(exponent).is_integer() else _root(round(2 * exponent))
    if exponent < 0 and float(exponent).is_integer():
        return elementwise(_of_choices(lambda a: _divided(sympy.Integer(1), a ** -int(exponent))))(i, op, known)
    return elementwise(_of_choices(power))(i, op, known)


def _same(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    return i.tensor(op["input"])


def _cast(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    inner = i.tensor(op["input"])
    if inner.kind == "float" and known.dtype != torch.bool and not known.dtype.is_floating_point:
        raise Unreadable("float to int")
    convert = boolean if known.dtype == torch.bool else number
    return i.map(lambda a: convert(a), op["input"])


def _dropout(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    if op["p"] and op["training"]:
        raise Unreadable("dropout")
    return i.tensor(op["input"])


READERS: dict[str, Reader] = {
    **{name: _compare(name) for name in ("le", "lt", "ge", "gt", "eq", "ne")},
    **{name: _logic(c) for name, c in (("and", sympy.And), ("or", sympy.Or), ("xor", sympy.Xor))},
    "add": _scaled(1),
    "sub": _scaled(-1),
    "mul": _mul,
    "not": _not,
    "truediv": _truediv,
    "floordiv": _whole(FloorDiv),
    "mod": _whole(sympy.Mod),
    "max": _greatest,
    "minimum": _binary(sympy.Min),
    "maximum": _binary(sympy.Max),
    "clamp": _clamp,
    "where": _where,
    "masked_fill": _masked_fill,
    "neg": elementwise(lambda a: -a),
    "abs": elementwise(sympy.Abs),
    "tanh": elementwise(sympy.tanh),
    "exp": elementwise(_of_choices(_exp)),
    "log": elementwise(_of_choices(_log)),
    "sqrt": elementwise(_of_choices(_root(1))),
    "rsqrt": elementwise(_of_choices(_root(-1))),
    "square": elementwise(lambda a: a * a),
    "reciprocal": elementwise(_of_choices(lambda a: _divided(sympy.Integer(1), a))),
    "log1p": elementwise(_of_choices(lambda a: _log(a + 1))),
    "expm1": elementwise(_of_choices(lambda a: _exp(a) - 1)),
    "sigmoid": elementwise(lambda a: by_cases(_sigmoid, a)),
    "silu": elementwise(lambda a: by_cases(lambda x: x * _sigmoid(x), a)),
    "leaky_relu": _leaky_relu,
    "hardtanh": _hardtanh,
    "relu": elementwise(lambda a: by_cases(lambda x: sympy.Max(x, 0), a)),
    "nan_to_num": _nan_to_num,
    "pow": _pow,
    **dict.fromkeys(("contiguous", "clone", "detach", "alias"), _same),
    **dict.fromkeys(("to", "type", "type_as", "bool", "long", "int", "float", "half", "double", "bfloat16"), _cast),
    "dropout": _dropout,
}
