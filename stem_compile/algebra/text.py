"""Expressions as text and back: what stands in graphs, operator arguments and cache keys.

The text is a readable subset of Python: ``(kv <= q + S0) & Ne(T0(b, kv), 0)``. It is read back node by node from its
syntax tree, never evaluated: operators and names of the function table (``functions.py``), symbols, loads and numbers,
and nothing else. ``decode(encode(e)) == e``; ``encode`` refuses what would not come back as it was.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from typing import Any

import sympy
from sympy.logic.boolalg import BooleanFalse, BooleanTrue
from sympy.printing.str import StrPrinter

from stem_compile.algebra import functions, symbols
from stem_compile.algebra.functions import FloorDiv

CONSTANTS: dict[str, Any] = {"inf": sympy.oo, "E": sympy.E, "pi": sympy.pi}
"""Numbers with a name."""


class OutsideAlgebra(TypeError):
    """An expression holds something that masks and scores may not."""


def check(expr: Any) -> None:
    """Raise OutsideAlgebra, naming the offending part, unless ``expr`` consists of the table's functions, the symbols
    of ``symbols.py``, loads and numbers."""
    _check(sympy.sympify(expr, strict=True))


@functools.lru_cache(maxsize=4096)
def _check(expr: Any) -> None:
    if isinstance(expr, BooleanTrue | BooleanFalse):
        return
    if expr.is_Symbol:
        if symbols.names().get(str(expr)) != expr:
            raise OutsideAlgebra(f"symbol {expr} is unknown here; known are {', '.join(sorted(symbols.names()))}")
        return
    if expr.is_Float:
        if sympy.Float(float(expr)) != expr:
            raise OutsideAlgebra(f"{expr} has more digits than a double")
        return
    if expr.is_Rational or expr in (-sympy.oo, *CONSTANTS.values()):
        if expr is sympy.nan:
            raise OutsideAlgebra("NaN")
        return
    if (number := symbols.load_index(expr)) is not None:
        if number >= symbols.LOADS:
            raise OutsideAlgebra(f"T{number}: at most {symbols.LOADS} tensors are read")
    else:
        row = functions.row_of(expr)
        if row is None:
            known = ", ".join(r.name for r in functions.table())
            raise OutsideAlgebra(
                f"{type(expr).__name__} in {expr} is none of the functions a mask or score may hold ({known}); extend "
                "stem_compile/algebra/functions.py by a row, or call functions.register"
            )
        if problem := row.problem(expr):
            raise OutsideAlgebra(f"{row.name} in {expr}: {problem}")
    for argument in expr.args:
        _check(argument)


class _Printer(StrPrinter):  # type: ignore[misc]
    """sympy's infix text, with the table's names and with numbers that read back as they are."""

    def _print_Float(self, expr: Any) -> str:
        return repr(float(expr))

    def _print_Infinity(self, expr: Any) -> str:
        return "inf"

    def _print_NegativeInfinity(self, expr: Any) -> str:
        return "-inf"

    def _print_Function(self, expr: Any) -> str:
        row = functions.row_of(expr)
        name = row.name if row is not None else expr.func.__name__
        return f"{name}({', '.join(self._print(a) for a in expr.args)})"

    def _print_Xor(self, expr: Any) -> str:
        return f"Xor({', '.join(self._print(a) for a in sorted(expr.args, key=sympy.default_sort_key))})"


def encode(expr: Any) -> str:
    """Canonical text of an expression; equal expressions give equal text in every process.

    Raises OutsideAlgebra for what the algebra does not hold.
    """
    return _encoded(sympy.sympify(expr, strict=True))


@functools.lru_cache(maxsize=4096)
def _encoded(expr: Any) -> str:
    check(expr)
    text = str(_Printer().doprint(expr))
    if decode(text) != expr:
        raise OutsideAlgebra(f"{text} would be read back as {decode(text)}")
    return text


@functools.lru_cache(maxsize=4096)
def decode(text: str) -> Any:
    """Expression of the text that ``encode`` wrote. Raises ValueError for anything else."""
    try:
        return _built(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, RecursionError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"not an expression: {text!r} ({error})") from error


_RELATIONS: dict[type, str] = {
    ast.LtE: "Le",
    ast.Lt: "Lt",
    ast.GtE: "Ge",
    ast.Gt: "Gt",
    ast.Eq: "Eq",
    ast.NotEq: "Ne",
}


def _built(node: ast.expr) -> Any:
    for kind, build in _BUILDERS.items():
        if isinstance(node, kind):
            return build(node)
    raise ValueError(f"not an expression: {ast.unparse(node)!r}")


def _constant(node: ast.Constant) -> Any:
    if isinstance(node.value, bool):
        return sympy.true if node.value else sympy.false
    if isinstance(node.value, int):
        return sympy.Integer(node.value)
    if isinstance(node.value, float):
        return sympy.Float(node.value)
    raise ValueError(f"not a number: {node.value!r}")


def _name(node: ast.Name) -> Any:
    value = CONSTANTS.get(node.id, symbols.names().get(node.id))
    if value is None or symbols.load_index(value) is not None or isinstance(value, sympy.core.function.FunctionClass):
        raise ValueError(f"unknown name {node.id!r}")
    return value


def _call(node: ast.Call) -> Any:
    if not isinstance(node.func, ast.Name) or node.keywords:
        raise ValueError(f"not a function: {ast.unparse(node)!r}")
    name, args = node.func.id, [_built(a) for a in node.args]
    if name == "sqrt" and len(args) == 1:
        return sympy.sqrt(args[0])
    load = symbols.names().get(name)
    if isinstance(load, sympy.core.function.FunctionClass):
        return load(*args)
    row = functions.by_name().get(name)
    if row is None:
        raise ValueError(f"unknown function {name!r}")
    if len(args) < len(row.takes) or (len(args) > len(row.takes) and not row.variadic):
        raise ValueError(f"{name} takes {len(row.takes)} arguments, not {len(args)}")
    return _applied(row, args)


def _applied(row: functions.Function, args: list[Any]) -> Any:
    # Relations and negations are kept as they stand: sympy would turn them round.
    as_written = issubclass(row.kind, sympy.core.relational.Relational | sympy.Not)
    return row.kind(*args, evaluate=False) if as_written else row.kind(*args)


def _compare(node: ast.Compare) -> Any:
    if len(node.ops) != 1 or type(node.ops[0]) not in _RELATIONS:
        raise ValueError(f"not one comparison: {ast.unparse(node)!r}")
    row = functions.by_name()[_RELATIONS[type(node.ops[0])]]
    return _applied(row, [_built(node.left), _built(node.comparators[0])])


def _unary(node: ast.UnaryOp) -> Any:
    if isinstance(node.op, ast.Invert | ast.Not):
        return sympy.Not(_built(node.operand), evaluate=False)
    return sympy.Mul(*_factors(node))


def _binary(node: ast.BinOp) -> Any:
    if isinstance(node.op, ast.BitAnd | ast.BitOr):
        kind = sympy.And if isinstance(node.op, ast.BitAnd) else sympy.Or
        return kind(*(_built(part) for part in _chain(node, type(node.op))))
    if isinstance(node.op, ast.Add | ast.Sub):
        return sympy.Add(*_terms(node))
    if isinstance(node.op, ast.Mult | ast.Div):
        return sympy.Mul(*_factors(node))
    if isinstance(node.op, ast.Pow):
        return sympy.Pow(_built(node.left), _built(node.right))
    if isinstance(node.op, ast.FloorDiv | ast.Mod):
        return (FloorDiv if isinstance(node.op, ast.FloorDiv) else sympy.Mod)(_built(node.left), _built(node.right))
    raise ValueError(f"operator of {ast.unparse(node)!r}: write Xor(a, b), FloorDiv(a, b) or a**b")


def _chain(node: ast.expr, operator: type) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, operator):
        return _chain(node.left, operator) + _chain(node.right, operator)
    return [node]


def _terms(node: ast.expr) -> list[Any]:
    """Summands, all at once: sums are sorted when they are built."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _terms(node.left) + _terms(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub):
        return [*_terms(node.left), sympy.Mul(-1, *_factors(node.right))]
    return [_built(node)]


def _factors(node: ast.expr) -> list[Any]:
    """Factors, all at once: sympy multiplies a number into a sum, but not into a product that holds one."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return _factors(node.left) + _factors(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return [*_factors(node.left), sympy.Pow(_built(node.right), -1)]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return [sympy.Integer(-1), *_factors(node.operand)]
    return [_built(node)]


_BUILDERS: dict[type, Callable[[Any], Any]] = {
    ast.Constant: _constant,
    ast.Name: _name,
    ast.Call: _call,
    ast.Compare: _compare,
    ast.UnaryOp: _unary,
    ast.BinOp: _binary,
}
