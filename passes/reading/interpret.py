"""Read a tensor subgraph symbolically: every tensor is an expression in its own index symbols.

``Interpreter.tensor(node)`` gives a ``SymTensor``: a shape and a function from index expressions to a sympy expression.
Reading is lazy and memoised, so a mask of N x N elements costs a handful of expressions. What each operation means is
said in ``readers/``, one file a family. Tensors that are not understood but hold O(length) elements (attention masks,
position ids, slopes) become loads ``T0(b, kv)`` from the node itself. Everything else raises ``Unreadable``, or under
``opaque`` becomes a load as well: right, but then the whole tensor is computed.
"""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx

from stem_compile.algebra import symbolic
from stem_compile.algebra.symbolic import Where
from stem_compile.passes.graph import memory, normalize
from stem_compile.passes.graph.values import value

HIDDEN = -1.0e39
"""What -inf is read as: a number that arithmetic survives, below every finite fp32. Floats are read as the fractions
they are: -1e4 beside it must not be rounded away."""

CASES = 3
"""Most choices of an expression that a comparison is taken through one by one."""


class Unreadable(Exception):
    """The graph says something the reader has no words for; the message names the node."""


@dataclass(frozen=True)
class SymTensor:
    """shape: ints or SymInts. at: index expressions -> value expression (a Boolean for bool tensors). kind: "bool",
    "int" or "float"."""

    shape: tuple[Any, ...]
    at: Callable[[tuple[Any, ...]], Any]
    kind: str


Reader = Callable[["Interpreter", normalize.Op, torch.Tensor], SymTensor]
"""Meaning of one operation: (interpreter, operation with bound arguments, example value of the result) -> symbolic
value."""


@functools.cache
def readers() -> Mapping[str, Reader]:
    """Canonical operation name -> reader, collected from the READERS of every file in ``readers/``."""
    folder = Path(__file__).with_name("readers")
    found: dict[str, Reader] = {}
    for module in pkgutil.iter_modules([str(folder)]):
        found |= importlib.import_module(f"stem_compile.passes.reading.readers.{module.name}").READERS
    return found


def kind_of(dtype: torch.dtype) -> str:
    """Arithmetic that a dtype follows."""
    return "bool" if dtype == torch.bool else "float" if dtype.is_floating_point else "int"


def as_expr(number: Any) -> Any:
    """Sympy expression of an int, bool, float, SymInt or SymFloat."""
    if isinstance(number, bool):
        return sympy.true if number else sympy.false
    if isinstance(number, torch.SymInt):
        return number.node.expr
    if isinstance(number, torch.SymFloat):
        # Under dynamic=True Dynamo passes a module's float attributes as inputs; reading one guards on its value.
        number = float(number)
    if isinstance(number, float):
        if number != number:
            raise Unreadable("NaN")
        return sympy.Rational(
            number if abs(number) <= torch.finfo(torch.float32).max else math.copysign(HIDDEN, number)
        )
    if isinstance(number, int):
        return sympy.Integer(number)
    raise Unreadable(f"scalar of type {type(number).__name__}")


def boolean(expr: Any) -> Any:
    """Truth value of an expression: a condition stays, a number is compared with zero."""
    if (
        expr in (sympy.true, sympy.false)
        or getattr(expr, "is_Relational", False)
        or isinstance(expr, sympy.logic.boolalg.Boolean)
    ):
        return expr
    return decided(lambda n: sympy.Ne(n, 0), expr)


def decided(relation: Callable[[Any], Any], expr: Any) -> Any:
    """``relation(expr)``, asked in each case of the few choices that the expression holds: conditions turned into
    numbers are conditions again."""
    choices = sorted(expr.atoms(Where), key=sympy.default_sort_key)
    if not 0 < len(choices) <= CASES:
        return relation(expr)
    choice = next(c for c in choices if not any(c != other and other.has(c) for other in choices))
    condition, *ends = choice.args
    yes, no = (decided(relation, expr.xreplace({choice: end})) for end in ends)
    return sympy.Or(sympy.And(condition, yes), sympy.And(sympy.Not(condition), no))


def number(expr: Any) -> Any:
    """Numeric value of an expression: a condition counts 1 or 0."""
    if expr in (sympy.true, sympy.false):
        return sympy.Integer(expr == sympy.true)
    if isinstance(expr, sympy.logic.boolalg.Boolean) and not isinstance(expr, sympy.Symbol):
        return Where(expr, sympy.Integer(1), sympy.Integer(0))
    return expr


def is_one(size: Any) -> bool:
    """Whether a dimension broadcasts. A SymInt never does: Dynamo specialises 1."""
    return isinstance(size, int) and size == 1


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are the same expression."""
    return bool(symbolic.expand(as_expr(a) - as_expr(b)) == 0)


def broadcast_index(index: tuple[Any, ...], shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """Index of a tensor of ``shape`` inside a broadcast result: trailing dimensions align, size 1 is read at 0."""
    tail = index[len(index) - len(shape) :]
    return tuple(sympy.Integer(0) if is_one(size) else i for i, size in zip(tail, shape, strict=True))


class Interpreter:
    """Reads nodes of one graph. ``leaves`` maps load number -> node, in the order in which loads were met.

    given: nodes whose symbolic value is known beforehand (the product of an attention); nothing that is computed from
    them becomes a load.
    extents: index symbols -> sizes they stay below. lengths: sizes that grow with the prompt. opaque: unreadable
    tensors of any size become loads.
    """

    def __init__(
        self,
        lengths: tuple[Any, ...] = (),
        given: Mapping[fx.Node, SymTensor] | None = None,
        extents: Mapping[Any, Any] | None = None,
        opaque: bool = False,
    ) -> None:
        self.leaves: list[fx.Node] = []
        self.read_nodes: set[fx.Node] = set()
        self.given, self.extents, self.opaque = dict(given or {}), dict(extents or {}), opaque
        self._lengths = tuple(as_expr(n) for n in lengths)
        self._memo: dict[fx.Node, SymTensor] = {}
        self._derived: dict[fx.Node, bool] = {}

    def focus(self, given: Mapping[fx.Node, SymTensor], extents: Mapping[Any, Any]) -> None:
        """Turn to another attention of the graph."""
        self.given, self.extents = dict(given), dict(extents)
        self._derived.clear()

    def tensor(self, node: Any) -> SymTensor:
        """Symbolic value of a node, or of a Python number as a 0-d tensor. Raises Unreadable."""
        if not isinstance(node, fx.Node):
            return self._constant(node)
        if node not in self._memo:
            self._memo[node] = self.given.get(node) or self._read(node)
        return self._memo[node]

    def _constant(self, number_: Any) -> SymTensor:
        expr = as_expr(number_)
        kind = (
            "bool" if isinstance(number_, bool) else "float" if isinstance(number_, float | torch.SymFloat) else "int"
        )
        return SymTensor((), lambda _: expr, kind)

    def _read(self, node: fx.Node) -> SymTensor:
        known = value(node)
        if isinstance(known, int | float | torch.SymInt | torch.SymFloat):
            return self._constant(known)
        if not isinstance(known, torch.Tensor):
            raise Unreadable(f"{node.name} is no tensor")
        self.read_nodes.add(node)
        op = normalize.read(node) or memory.functional(node)
        try:
            if op is None or op.name not in readers():
                raise Unreadable(f"{node.name} ({normalize.spelling(node) or node.target})")
            result = readers()[op.name](self, op, known)
        except Unreadable as error:
            return self._leaf(node, known, error)
        if len(result.shape) != known.dim():
            raise Unreadable(f"{node.name}: rank {len(result.shape)} was read, {known.dim()} recorded")
        result = SymTensor(tuple(known.shape), result.at, kind_of(known.dtype))
        if known.dtype in symbolic.NARROW:
            low, high = self.bounds(result)
            if low < torch.iinfo(known.dtype).min or high > torch.iinfo(known.dtype).max:
                return self._leaf(node, known, Unreadable(f"{node.name} may be beyond {known.dtype}"))
        return result

    def bounds(self, tensor: SymTensor) -> tuple[Any, Any]:
        """Least and greatest value of a tensor, wherever it is read."""
        index = tuple(sympy.Symbol(f"_i{n}", integer=True, nonnegative=True) for n in range(len(tensor.shape)))
        box: dict[Any, Any] = {
            i: (0, n - 1 if isinstance(n, int) else symbolic.INFINITE) for i, n in zip(index, tensor.shape, strict=True)
        }
        for number_, leaf in enumerate(self.leaves):
            limits = torch.iinfo(dtype) if (dtype := value(leaf).dtype) in symbolic.NARROW else None
            if limits is not None:
                box[symbolic.tensor(number_)] = functools.partial(lambda limits, *_: (limits.min, limits.max), limits)
        expr = number(tensor.at(index))
        low, high = symbolic.bounds(expr, box)
        return (max(low, 0) if expr.is_nonnegative else low), high

    def _leaf(self, node: fx.Node, known: torch.Tensor, error: Unreadable) -> SymTensor:
        if known.dtype.is_complex or known.dim() > 4 or self.derived(node):
            raise error
        if not self.opaque and self.is_quadratic(known):
            raise Unreadable(
                f"{node.name} ({normalize.spelling(node) or node.op}) of shape {tuple(map(str, known.shape))}"
            ) from error
        if node not in self.leaves:
            self.leaves.append(node)
        load, shape = symbolic.tensor(self.leaves.index(node)), tuple(known.shape)
        is_bool = known.dtype == torch.bool

        def at(index: tuple[Any, ...]) -> Any:
            loaded = load(*(sympy.Integer(0) if is_one(n) else i for i, n in zip(index, shape, strict=True)))
            return sympy.Ne(loaded, 0) if is_bool else loaded

        return SymTensor(shape, at, kind_of(known.dtype))

    def is_quadratic(self, known: torch.Tensor) -> bool:
        """Whether two dimensions of a tensor grow with the prompt."""
        long = [
            n
            for n in known.shape
            if not is_one(n) and (not isinstance(n, int) or as_expr(n) in self._lengths or not self._lengths)
        ]
        return len(long) > 1 and sum(not is_one(n) for n in known.shape[1:]) > 1

    def derived(self, node: fx.Node) -> bool:
        """Whether ``node`` is computed from a given one."""
        if node not in self._derived:
            self._derived[node] = node in self.given
            self._derived[node] = self._derived[node] or any(self.derived(n) for n in node.all_input_nodes)
        return self._derived[node]

    def call(self, module: fx.GraphModule, arguments: list[Any], buffers: tuple[fx.Node, ...]) -> Any:
        """Value of a function of 0-d tensors, given as a graph: ``arguments`` are expressions, ``buffers`` tensors of
        this graph."""
        kinds = [
            SymTensor((), functools.partial(lambda e, _: e, e), "int" if e.is_integer else "float") for e in arguments
        ]
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        given = dict(zip(placeholders, [*kinds, *(self.tensor(b) for b in buffers)], strict=True))
        inner = Interpreter((), given, self.extents)
        result = next(n for n in module.graph.nodes if n.op == "output").args[0]
        expr = inner.tensor(result[0] if isinstance(result, tuple | list) else result).at(())
        if inner.leaves:
            raise Unreadable(f"{inner.leaves[0].name} inside {module.__class__.__name__}")
        return expr

    def map(self, function: Callable[..., Any], *nodes: Any) -> SymTensor:
        """Broadcast ``function`` over tensors."""
        parts = [self.tensor(n) for n in nodes]
        rank = max(len(p.shape) for p in parts)

        def at(index: tuple[Any, ...]) -> Any:
            return function(*(p.at(broadcast_index(index, p.shape)) for p in parts))

        return SymTensor((None,) * rank, at, "")

    def divide(self, expr: Any, size: Any) -> tuple[Any, Any]:
        """(quotient, remainder) of a nonnegative index expression by a size: ``(b * heads + h, heads) -> (b, h)``."""
        divisor = as_expr(size)
        whole, rest = sympy.Integer(0), sympy.Integer(0)
        for term in sympy.Add.make_args(symbolic.expand(expr)):
            share = sympy.cancel(term / divisor)
            if share.is_integer and sympy.denom(share) == 1:
                whole += share
            else:
                rest += term
        if (
            rest == 0
            or (rest in self.extents and same(self.extents[rest], size))
            or (rest.is_Integer and divisor.is_Integer and 0 <= rest < divisor)
        ):
            return whole, rest
        if not divisor.is_Integer:
            raise Unreadable("an index split by a symbolic size")
        return symbolic.FloorDiv(expr, divisor), sympy.Mod(expr, divisor)

    def below(self, index: Any, size: Any) -> bool | None:
        """Whether an index is surely below (True) or surely not below (False) a size; None when unknown."""
        bound = as_expr(size)
        if index in self.extents:
            gap = symbolic.expand(bound - as_expr(self.extents[index]))
            return True if gap.is_nonnegative else None
        gap = symbolic.expand(sympy.sympify(index) - bound)
        return False if gap.is_nonnegative else True if gap.is_negative else None
