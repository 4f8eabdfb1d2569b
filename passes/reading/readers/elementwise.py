"""Elementwise operations: comparison, logic, arithmetic, choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from stem_compile.algebra.symbolic import KV, B, FloorDiv, H, Q, Where
from stem_compile.passes.graph.normalize import Op
from stem_compile.passes.graph.values import value
from stem_compile.passes.reading.interpret import (
    Interpreter,
    Reader,
    SymTensor,
    Unreadable,
    as_expr,
    boolean,
    decided,
    number,
)


def _compare(name: str) -> Reader:
    relation = {"le": sympy.Le, "lt": sympy.Lt, "ge": sympy.Ge, "gt": sympy.Gt, "eq": sympy.Eq, "ne": sympy.Ne}[name]

    def compare(a: Any, b: Any) -> Any:
        a, b = number(a), number(b)
        return decided(lambda n: relation(n, b), a) if b.is_number else relation(a, b)

    def read(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
        rounded = any(
            getattr(value(op[side]), "dtype", None) in (torch.float16, torch.bfloat16) for side in ("input", "other")
        )

        def compared(a: Any, b: Any) -> Any:
            if rounded and _counts(number(a) - number(b)):
                raise Unreadable("positions in half precision, which has no room for them")
            return compare(a, b)

        return i.map(compared, op["input"], op["other"])

    return read


def _counts(expr: Any) -> bool:
    """Whether positions enter a number themselves, not only in conditions or as places of loads."""
    inside = {e: sympy.Integer(0) for e in expr.atoms(Where) | expr.atoms(sympy.core.function.AppliedUndef)}
    ends = [end for e in expr.atoms(Where) for end in e.args[1:]]
    return bool(expr.xreplace(inside).free_symbols & {B, H, Q, KV}) or any(_counts(end) for end in ends)


def _logic(connective: Any) -> Reader:
    def read(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
        if known.dtype != torch.bool:
            raise Unreadable(f"bitwise {op.name} of integers")
        return i.map(lambda a, b: connective(boolean(a), boolean(b)), op["input"], op["other"])

    return read


def _arithmetic(function: Callable[[Any, Any], Any]) -> Reader:
    return lambda i, op, known: i.map(lambda a, b: function(number(a), number(b)), op["input"], op["other"])


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
    return i.map(lambda a, b: number(a) / number(b), op["input"], op["other"])


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
    return i.map(lambda a, b: sympy.Max(number(a), number(b)), op["input"], op["dim"])


def _clamp(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    bounds = [(f, op[side]) for f, side in ((sympy.Max, "min"), (sympy.Min, "max")) if op[side] is not None]

    def read(a: Any, *limits: Any) -> Any:
        for (function, _), limit in zip(bounds, limits, strict=True):
            a = function(number(a), number(limit))
        return a

    return i.map(read, op["input"], *(limit for _, limit in bounds))


def _function(function: Callable[[Any], Any]) -> Reader:
    return lambda i, op, known: i.map(lambda a: function(number(a)), op["input"])


def _pow(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    if not isinstance(value(op["exponent"]), int | float):
        raise Unreadable("a power with a tensor exponent")
    return i.map(lambda a, b: number(a) ** number(b), op["input"], op["exponent"])


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
    "minimum": _arithmetic(sympy.Min),
    "maximum": _arithmetic(sympy.Max),
    "clamp": _clamp,
    "where": _where,
    "masked_fill": _masked_fill,
    "neg": _function(lambda a: -a),
    "abs": _function(sympy.Abs),
    "tanh": _function(sympy.tanh),
    "exp": _function(sympy.exp),
    "log": _function(sympy.log),
    "sqrt": _function(lambda a: a ** sympy.Rational(1, 2)),
    "rsqrt": _function(lambda a: a ** sympy.Rational(-1, 2)),
    "pow": _pow,
    **dict.fromkeys(("contiguous", "clone", "detach", "alias"), _same),
    **dict.fromkeys(("to", "type", "type_as", "bool", "long", "int", "float", "half", "double", "bfloat16"), _cast),
    "dropout": _dropout,
}
