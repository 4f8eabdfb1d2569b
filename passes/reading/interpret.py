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
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx

from stem_compile.algebra import symbolic
from stem_compile.algebra.symbolic import KV
from stem_compile.passes.graph import memory, normalize
from stem_compile.passes.graph.values import View, value
from stem_compile.passes.reading import exact
from stem_compile.passes.reading.expressions import (
    INTEGERS,
    as_expr,
    broadcast_index,
    guarded,
    is_one,
    kind_of,
    may_round,
    number,
    same,
)
from stem_compile.passes.reading.unreadable import Unreadable


@dataclass(frozen=True)
class SymTensor:
    """A tensor as a function of its index.

    shape: ints or SymInts. at: index expressions -> value expression (a Boolean for bool tensors). kind: "bool", "int"
    or "float". exact: whether the graph holds these very values; where not, its arithmetic rounds them.
    """

    shape: tuple[Any, ...]
    at: Callable[[tuple[Any, ...]], Any]
    kind: str
    exact: bool = True


Reader = Callable[["Interpreter", normalize.Op, torch.Tensor], SymTensor]
"""Meaning of one operation: (interpreter, operation with bound arguments, example value of the result) -> symbolic
value."""


@functools.cache
def _built_in() -> dict[str, Reader]:
    folder = Path(__file__).with_name("readers")
    table: dict[str, Reader] = {}
    for module in pkgutil.iter_modules([str(folder)]):
        table |= importlib.import_module(f"stem_compile.passes.reading.readers.{module.name}").READERS
    return table


def readers() -> Mapping[str, Reader]:
    """Canonical operation name -> reader: the READERS of every file in ``readers/`` and those that were registered."""
    return _built_in()


def register_reader(name: str, reader: Reader, signature: tuple[normalize.Parameter, ...] | None = None) -> None:
    """Teach the interpreter an operation. A function of the algebra that is elementwise needs no more than this::

        register_reader("sign", elementwise(Sign), normalize.signature("input"))

    name: as ``torch`` spells it. signature: the operation's parameters, where the vocabulary has not got them
    (``normalize.SIGNATURES``). Raises ValueError where the operation has a reader, or no signature is known.
    """
    if name in readers():
        raise ValueError(f"operation {name!r} has a reader already")
    if signature is None and name not in normalize.SIGNATURES:
        raise ValueError(f"operation {name!r} is not in the vocabulary; give its signature")
    if signature is not None:
        normalize.SIGNATURES.setdefault(name, signature)
    _built_in()[name] = reader


def unregister_reader(name: str) -> None:
    """Forget a reader. Raises KeyError where there is none."""
    del _built_in()[name]


def elementwise(function: Callable[..., Any], *parameters: str) -> Reader:
    """Reader of an operation that applies a function of numbers to the elements of ``parameters`` (default: input)."""
    names = parameters or ("input",)
    return lambda i, op, known: i.map(lambda *a: function(*map(number, a)), *(op[n] for n in names))


def _places(tensor: SymTensor) -> tuple[Any, ...]:
    """Index symbols that stand for any place in a tensor."""
    return tuple(sympy.Symbol(f"_i{n}", integer=True, nonnegative=True) for n in range(len(tensor.shape)))


class Interpreter:
    """Reads nodes of one graph. ``leaves`` maps load number -> node, or view of one, in the order in which loads
    were met.

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
        self.leaves: list[fx.Node | View] = []
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
        if isinstance(number_, bool):
            return SymTensor((), lambda _: expr, "bool")
        if not isinstance(number_, float | torch.SymFloat):
            return SymTensor((), lambda _: expr, "int")
        size = float(exact.LONGEST)
        return SymTensor((), lambda _: expr, "float", expr.is_number or exact.holds(torch.float32, expr, (0, size)))

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
            result = guarded(readers()[op.name])(self, op, known)
            if len(result.shape) != known.dim():
                raise Unreadable(f"{node.name}: rank {len(result.shape)} was read, {known.dim()} recorded")
            result = SymTensor(tuple(known.shape), guarded(result.at), kind_of(known.dtype))
            if self.derived(node):
                return result
            if self.opaque:
                self._try(result)
            return self._in_dtype(node, op, result, known.dtype)
        except Unreadable as error:
            return self._leaf(node, known, error)

    def _try(self, tensor: SymTensor) -> None:
        """Read a tensor somewhere: what cannot be read is found while it may still become a load."""
        extents = self.extents
        self.extents = extents | dict(zip(_places(tensor), tensor.shape))
        try:
            tensor.at(_places(tensor))
        finally:
            self.extents = extents

    def _in_dtype(self, node: fx.Node, op: normalize.Op, result: SymTensor, dtype: torch.dtype) -> SymTensor:
        """The result as its dtype holds it. Raises Unreadable where the dtype does more to it than can be said."""
        if not dtype.is_floating_point:
            cast = any(t.dtype != dtype for n in node.all_input_nodes if isinstance(t := value(n), torch.Tensor))
            if dtype in INTEGERS and (cast or op.name not in exact.KEEPS):
                low, high = self.bounds(result, exact.LONGEST)
                limits = torch.iinfo(dtype)
                unknown = dtype == torch.int64 and symbolic.INFINITE in (high, -low)
                if not unknown and (low < limits.min or high > limits.max):
                    raise Unreadable(f"{node.name} may be beyond {dtype}")
            return result
        inputs = [self.tensor(n) for n in node.all_input_nodes if isinstance(value(n), torch.Tensor)]
        given = [t for t in inputs if t.kind == "float"]
        kept = all(t.exact for t in given)
        constants = SymTensor(result.shape, lambda index: exact.rounded(result.at(index), dtype), result.kind, kept)
        wider = [
            n for n in node.all_input_nodes if isinstance(value(n), torch.Tensor) and may_round(value(n).dtype, dtype)
        ]
        if op.name in exact.KEEPS and not wider:
            return constants
        if self.fits(constants, dtype):
            return constants
        if dtype in exact.HALF and exact.mixes(sympy.sympify(constants.at(_places(result)))):
            raise Unreadable(f"{node.name} is rounded to {dtype}")
        return SymTensor(constants.shape, constants.at, constants.kind, False)

    def fits(self, tensor: SymTensor, dtype: torch.dtype) -> bool:
        """Whether a floating-point dtype holds every element exactly."""
        expr = sympy.sympify(number(tensor.at(_places(tensor))))
        return exact.holds(dtype, expr, self.bounds(tensor, exact.LONGEST))

    def bounds(self, tensor: SymTensor, longest: Any = symbolic.INFINITE) -> tuple[Any, Any]:
        """Least and greatest value of a tensor, wherever it is read. longest: what symbolic sizes stay below."""
        index = _places(tensor)
        box: dict[Any, Any] = {
            i: (0, n - 1 if isinstance(n, int) else longest) for i, n in zip(index, tensor.shape, strict=True)
        }
        for number_, leaf in enumerate(self.leaves):
            limits = torch.iinfo(dtype) if (dtype := value(leaf).dtype) in INTEGERS[:-1] else None
            if limits is not None:
                box[symbolic.tensor(number_)] = functools.partial(lambda limits, *_: (limits.min, limits.max), limits)
        expr = sympy.sympify(number(tensor.at(index)))
        box |= {s: (0, longest) for s in expr.free_symbols if s not in box and s.is_nonnegative}
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

    def row_maximum(self, load: Any) -> Any:
        """The greatest value that a load takes over the keys of a query, as a load of its own; None where the load's
        last dimension is not the keys."""
        leaf = self.leaves[symbolic.load_index(load) or 0]
        length, keys, place = value(leaf).shape[-1], self.extents.get(KV), load.args[-1]
        start = place - KV
        if isinstance(leaf, View) or keys is None or any(a.has(KV) for a in load.args[:-1]):
            return None
        steps: tuple[tuple[str, tuple[Any, ...]], ...] = (("amax", (-1, True)),)
        if start != 0 or not same(length, keys):
            known = start.is_Integer and isinstance(length, int) and isinstance(keys, int)
            if not known or not 0 <= start <= length - keys:
                return None
            steps = (("narrow", (-1, int(start), keys)), *steps)
        greatest = View(leaf, steps)
        if greatest not in self.leaves:
            self.leaves.append(greatest)
        return symbolic.tensor(self.leaves.index(greatest))(*load.args[:-1], 0)

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
            raise Unreadable(f"a tensor is read inside {module.__class__.__name__}")
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
