"""The closed set of functions that masks, scores and budgets may hold: one row a function.

A row says for one sympy class how it is evaluated on numbers and tensors, bounded over a box, printed as Triton, and
what it is called in text. ``symbolic.evaluate``, ``symbolic.bounds``, ``text.encode``, ``text.decode`` and
``kernels/triton/codegen.py`` know no function but those of this table. To add one, write a row here, or call
``register`` from outside the package::

    class Sign(sympy.Function):
        nargs = (1,)

    functions.register(Function("Sign", Sign, (REAL,), REAL, evaluate=torch.sign, bounds=lambda a: (-1, 1),
                                triton="{tl}.where({0} > 0, 1.0, {tl}.where({0} < 0, -1.0, 0.0))"))

``tests/algebra/test_functions.py`` draws expressions from the table, so a new row is tested by being there.
"""

from __future__ import annotations

import enum
import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.core.relational import (
    Equality,
    GreaterThan,
    LessThan,
    Relational,
    StrictGreaterThan,
    StrictLessThan,
    Unequality,
)

from stem_compile.algebra import intervals, rounding
from stem_compile.algebra.intervals import Interval, as_tensor
from stem_compile.algebra.symbols import SCORE, load_index


class Sort(enum.Enum):
    """What an argument or a result is. NUMBER: integer where all numeric arguments are, else real."""

    BOOLEAN = "boolean"
    INTEGER = "integer"
    REAL = "real"
    NUMBER = "number"


BOOLEAN, INTEGER, REAL, NUMBER = Sort


class FloorDiv(sympy.Function):  # type: ignore[misc]
    """``floor(a / b)`` of integers, as Python's and torch's ``//``."""

    nargs = (2,)

    @classmethod
    def eval(cls, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
        """The quotient of two numbers, of a division by 1, and of a sum whose coefficients all divide."""
        if b == 0:
            return None
        if a.is_Integer and b.is_Integer:
            return sympy.Integer(int(a) // int(b))
        if b == 1:
            return a
        # (2 q) // 2 is q: every coefficient divides.
        if b.is_Integer and not any(c % b for c in expand(a).as_coefficients_dict().values()):
            return expand(a / b)
        return None

    def _eval_is_integer(self) -> bool:
        return True

    def _eval_is_nonnegative(self) -> bool | None:
        a, b = self.args
        return True if a.is_nonnegative and b.is_positive else None


class Where(sympy.Function):  # type: ignore[misc]
    """``a if condition else b``. Unlike sympy.Piecewise it never rewrites what it holds, so a budget stays as it was
    written."""

    nargs = (3,)

    @classmethod
    def eval(cls, condition: Any, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
        """The branch that a decided condition leaves."""
        if condition in (sympy.true, sympy.false):
            return a if condition == sympy.true else b
        return None

    def _eval_is_integer(self) -> bool | None:
        return True if self.args[1].is_integer and self.args[2].is_integer else None


class Distance(sympy.Function):  # type: ignore[misc]
    """``a - b`` of whole numbers, which nothing multiplies out (``distance.py``)."""

    nargs = (2,)

    @classmethod
    def eval(cls, a: sympy.Expr, b: sympy.Expr) -> sympy.Expr | None:
        return a - b if (a - b).is_number else None

    def _eval_is_integer(self) -> bool:
        return True


def expand(expr: Any) -> Any:
    """Multiply sums out, with every real function as an atom.

    sympy's own ``expand`` would split ``exp(a + b)`` into ``exp(a)*exp(b)``, which in floating point may be infinity
    times zero, and multiply out what is rounded to a dtype.
    """
    opaque: dict[Any, Any] = {f: sympy.Dummy(real=True) for f in _real_functions(sympy.sympify(expr))}
    inside = expr.xreplace(opaque) if opaque else expr
    expanded = sympy.expand(inside, power_exp=False, power_base=False, log=False, basic=False)
    return expanded.xreplace({dummy: f for f, dummy in opaque.items()}) if opaque else expanded


def _real_functions(expr: Any) -> set[Any]:
    """The outermost calls of rows whose result is real, beside powers."""
    row = row_of(expr)
    if row is not None and row.gives is REAL and not isinstance(expr, sympy.Pow):
        return {expr}
    return set().union(*(_real_functions(a) for a in expr.args)) if expr.args else set()


@dataclass(frozen=True)
class Function:
    """One row.

    name: what text calls it. kind: the sympy class; nodes of exactly this class are this function.
    takes: sorts of the arguments; the last repeats where ``variadic``. gives: sort of the result.
    evaluate: values (numbers or broadcastable tensors) -> value. bounds: intervals of the arguments -> interval.
    triton: source with ``{0}``, ``{1}``, ... for the arguments and ``{tl}`` for the language module,
    or a function of a ``Call``.
    domain: of each argument, the interval it must stay in for the function to be defined; None for any.
    constants: places of the arguments that must be numbers.
    """

    name: str
    kind: type[sympy.Basic]
    takes: tuple[Sort, ...]
    gives: Sort
    evaluate: Callable[..., Any]
    bounds: Callable[..., Interval]
    triton: str | Callable[[Call], str]
    variadic: bool = False
    domain: tuple[Interval | None, ...] = ()
    constants: tuple[int, ...] = ()

    def problem(self, expr: sympy.Basic) -> str:
        """Why ``expr``, of this row's class, may not stand in a mask or score; "" when it may."""
        count = len(expr.args)
        if count < len(self.takes) or (count > len(self.takes) and not self.variadic):
            return f"{count} arguments where {len(self.takes)} are taken"
        wrong = [expr.args[place] for place in self.constants if not expr.args[place].is_number]
        return f"{wrong[0]} is no number" if wrong else ""


@dataclass(frozen=True)
class Call:
    """A function about to be printed as Triton. operands: its arguments in printing order; arguments: their source.
    module: the language's name (``tl``, ``gl``). wide: whether whole numbers beyond int32 may arise. length: source of
    a positive int32 that the compiler does not know; None where the printed function has none."""

    expr: sympy.Basic
    operands: tuple[sympy.Basic, ...]
    arguments: tuple[str, ...]
    module: str
    wide: bool = False
    length: str | None = None

    def real(self, place: int) -> str:
        """An argument as a floating-point number: Triton's real functions take no integers."""
        text = self.arguments[place]
        return text if _is_floating(self.operands[place]) else f"({text} * 1.0)"

    def widest_first(self) -> tuple[str, ...]:
        """The arguments; where whole numbers beyond int32 may arise, one in 64 bits comes first and makes the others
        so. A load is widened where it is of integers: slopes and biases stay what they are."""
        if not self.wide:
            return self.arguments
        read = next((n for n, a in enumerate(self.operands) if _reads(a)), None)
        whole = next((n for n, a in enumerate(self.operands) if a.is_integer and not a.is_number), None)
        if read is None and whole is None:
            return self.arguments
        first = whole if read is None else read
        assert first is not None
        text = self.arguments[first]
        wide = f"long({text})" if read is not None else f"{self.module}.cast({text}, {self.module}.int64)"
        return wide, *self.arguments[:first], *self.arguments[first + 1 :]


def _is_floating(expr: Any) -> bool:
    """Whether an expression surely is a floating-point number where it is computed."""
    if expr.is_Float or expr == SCORE:
        return True
    if isinstance(expr, sympy.Add | sympy.Mul):
        return any(_is_floating(a) for a in expr.args)
    row = row_of(expr)
    return row is not None and row.gives is REAL and not (isinstance(expr, sympy.Pow) and expr.exp.is_Integer)


def _reads(expr: Any) -> bool:
    return any(load_index(f) is not None for f in expr.atoms(AppliedUndef))


_TABLE: dict[type[sympy.Basic], Function] = {}


def register(row: Function) -> Function:
    """Add a function. Raises ValueError where its class or its name is taken."""
    taken = {r.name for r in _TABLE.values()} | {"True", "False", "inf", "E", "pi", "sqrt"}
    if row.kind in _TABLE or row.name in taken or not row.name.isidentifier():
        raise ValueError(f"function {row.name!r} ({row.kind.__name__}) is registered already, or its name is reserved")
    _TABLE[row.kind] = row
    return row


def unregister(name: str) -> None:
    """Take a function out again. Raises KeyError for an unknown name."""
    del _TABLE[by_name()[name].kind]


def table() -> tuple[Function, ...]:
    """All rows, in the order of registration."""
    return tuple(_TABLE.values())


def row_of(expr: sympy.Basic) -> Function | None:
    """The row of an expression's outermost function; None for symbols, numbers, loads and functions outside the
    table."""
    return _TABLE.get(type(expr))


def by_name() -> dict[str, Function]:
    """Name in text -> row."""
    return {row.name: row for row in _TABLE.values()}


def _fold(function: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda *args: functools.reduce(function, args)


def _infix(sign: str) -> Callable[[Call], str]:
    """Source of an operator between any number of arguments."""
    return lambda call: "(" + f" {sign} ".join(call.widest_first()) + ")"


def _nested(name: str) -> Callable[[Call], str]:
    return lambda call: functools.reduce(lambda a, b: f"{call.module}.{name}({a}, {b})", call.arguments)


def _not(value: Any) -> Any:
    return ~value if isinstance(value, torch.Tensor) else not value


def _print_not(call: Call) -> str:
    (a,) = call.arguments
    return f"(not {a})" if a in ("True", "False") else f"(~{a})"


def _xor(a: Any, b: Any) -> Any:
    return a ^ b


def _where(condition: Any, a: Any, b: Any) -> Any:
    if not isinstance(condition, torch.Tensor):
        return a if condition else b
    return torch.where(condition, as_tensor(a, condition.device), as_tensor(b, condition.device))


def _elementwise(name: str, poles: dict[float, float] | None = None) -> Callable[[Any], Any]:
    """torch's function of a tensor, math's of a number. poles: values where math raises and torch does not."""

    def evaluate(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return getattr(torch, name)(x)
        if x in (poles or {}):
            return (poles or {})[x]
        try:
            return getattr(math, name)(x)
        except OverflowError:
            return math.inf
        except ValueError:
            return math.nan

    return evaluate


def _bounded_log(interval: Interval) -> Interval:
    # Below 0 the logarithm is NaN, of which an interval knows nothing.
    low = interval[0]
    if isinstance(low, torch.Tensor) or low < 0:
        return intervals.UNBOUNDED
    return intervals.monotone(_log)(interval)


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, torch.Tensor):
        whole = isinstance(exponent, int) and exponent >= 0
        return (base if whole or base.is_floating_point() else base.to(torch.get_default_dtype())) ** exponent
    try:
        return math.pow(base, exponent) if isinstance(exponent, float) else base**exponent
    except ZeroDivisionError:
        return math.inf
    except OverflowError:
        return math.inf if base > 0 or exponent % 2 == 0 else -math.inf
    except ValueError:
        return math.inf if base == 0 else math.nan


def _print_power(call: Call) -> str:
    exponent = call.operands[1]
    size = abs(exponent)
    if size.is_Integer and size <= 64:
        base = call.arguments[0]
        value = "(" + " * ".join([call.widest_first()[0] if size > 1 else base, *[base] * (int(size) - 1)]) + ")"
    elif size == sympy.Rational(1, 2):
        value = f"{call.module}.sqrt({call.real(0)})"
    else:
        value = f"{call.module}.exp2({float(size)!r} * {call.module}.log2({call.real(0)}))"
    return f"(1.0 / {value})" if exponent < 0 else value


def _print_division(call: Call) -> str:
    """Floor division or remainder. Triton's own round to 0, which is the same for dividends that are not negative."""
    (a, b), (dividend, divisor) = call.arguments, call.operands
    divides = isinstance(call.expr, FloorDiv)
    if dividend.is_nonnegative and divisor.is_positive:
        return f"({a} {'//' if divides else '%'} {b})"
    if divisor.is_Integer and divisor > 0 and int(divisor).bit_count() == 1:
        return f"({a} >> {int(divisor).bit_length() - 1})" if divides else f"({a} & {int(divisor) - 1})"
    return f"{'floordiv' if divides else 'floormod'}({a}, {b})"


def _print_float32(call: Call) -> str:
    """A float32 number that no compiler fuses with what is done to it: ``a*b - c`` must round twice."""
    return call.real(0) if call.length is None else f"unfused({call.real(0)}, {call.length})"


def _print_float16(call: Call) -> str:
    return f"{call.module}.cast({call.module}.cast({call.real(0)}, {call.module}.float16), {call.module}.float32)"


def _rounding(name: str, kind: type[rounding.Rounded], printed: str | Callable[[Call], str]) -> Function:
    dtype = kind.dtype
    return Function(name, kind, (REAL,), REAL, functools.partial(_swap(rounding.rounded), dtype),
                    functools.partial(_swap(rounding.bound), dtype), printed)  # fmt: skip


def _swap(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: function(b, a)


_log = _elementwise("log", {0: -math.inf})
_exp, _tanh = _elementwise("exp"), _elementwise("tanh")
_TINY = 2.0**-100


def _relation(name: str, kind: type[Relational], sign: str, test: Callable[[Any, Any], Any], bounds: Any) -> Function:
    return Function(name, kind, (NUMBER, NUMBER), BOOLEAN, test, bounds, "({0} " + sign + " {1})")


for _row in (
    _relation("Le", LessThan, "<=", operator.le, intervals.less_equal),
    _relation("Lt", StrictLessThan, "<", operator.lt, intervals.less),
    _relation("Ge", GreaterThan, ">=", operator.ge, lambda a, b: intervals.less_equal(b, a)),
    _relation("Gt", StrictGreaterThan, ">", operator.gt, lambda a, b: intervals.less(b, a)),
    _relation("Eq", Equality, "==", operator.eq, intervals.equal),
    _relation("Ne", Unequality, "!=", operator.ne, lambda a, b: intervals.invert(intervals.equal(a, b))),
    Function("And", sympy.And, (BOOLEAN, BOOLEAN), BOOLEAN, _fold(operator.and_), intervals.folded(operator.and_),
             _infix("&"), variadic=True),
    Function("Or", sympy.Or, (BOOLEAN, BOOLEAN), BOOLEAN, _fold(operator.or_), intervals.folded(operator.or_),
             _infix("|"), variadic=True),
    Function("Xor", sympy.Xor, (BOOLEAN, BOOLEAN), BOOLEAN, _fold(_xor), intervals.exclusive, _infix("^"),
             variadic=True),
    Function("Not", sympy.Not, (BOOLEAN,), BOOLEAN, _not, intervals.invert, _print_not),
    Function("Add", sympy.Add, (NUMBER, NUMBER), NUMBER, _fold(operator.add), intervals.add, _infix("+"),
             variadic=True),
    Function("Mul", sympy.Mul, (NUMBER, NUMBER), NUMBER, _fold(operator.mul), intervals.multiply, _infix("*"),
             variadic=True),
    Function("Pow", sympy.Pow, (REAL, REAL), REAL, _power, intervals.power, _print_power,
             domain=((_TINY, math.inf), None), constants=(1,)),
    Function("FloorDiv", FloorDiv, (INTEGER, INTEGER), INTEGER, operator.floordiv, intervals.floor_divide,
             _print_division, domain=(None, (1, math.inf))),
    Function("Mod", sympy.Mod, (INTEGER, INTEGER), INTEGER, operator.mod, intervals.modulo, _print_division,
             domain=(None, (1, math.inf))),
    Function("Min", sympy.Min, (NUMBER, NUMBER), NUMBER, _fold(intervals.minimum), intervals.folded(intervals.minimum),
             _nested("minimum"), variadic=True),
    Function("Max", sympy.Max, (NUMBER, NUMBER), NUMBER, _fold(intervals.maximum), intervals.folded(intervals.maximum),
             _nested("maximum"), variadic=True),
    Function("Abs", sympy.Abs, (NUMBER,), NUMBER, abs, intervals.absolute, "{tl}.abs({0})"),
    Function("Where", Where, (BOOLEAN, NUMBER, NUMBER), NUMBER, _where, intervals.choose, "{tl}.where({0}, {1}, {2})"),
    Function("exp", sympy.exp, (REAL,), REAL, _exp, intervals.monotone(_exp), lambda c: f"{c.module}.exp({c.real(0)})"),
    Function("log", sympy.log, (REAL,), REAL, _log, _bounded_log, lambda c: f"{c.module}.log({c.real(0)})",
             domain=((_TINY, math.inf),)),
    Function("tanh", sympy.tanh, (REAL,), REAL, _tanh, intervals.monotone(_tanh), lambda c: f"tanh({c.real(0)})"),
    Function("distance", Distance, (INTEGER, INTEGER), INTEGER, operator.sub, intervals.subtract,
             "({0} - {1})"),
    _rounding("fp32", rounding.Float32, _print_float32),
    _rounding("bf16", rounding.BFloat16, lambda c: f"to_bfloat16({c.real(0)})"),
    _rounding("fp16", rounding.Float16, _print_float16),
    Function("i32", rounding.Int32, (INTEGER,), INTEGER, rounding.wrapped, rounding.bound_wrapped,
             "{tl}.cast({0}, {tl}.int32)"),
):  # fmt: skip
    register(_row)
