"""Read a tensor subgraph symbolically: every tensor is an expression in its own index symbols.

``Interpreter.tensor(node)`` gives a ``SymTensor``: a shape and a function from index expressions to a sympy expression. Reading is lazy and
memoised, so a mask of N x N elements costs a handful of expressions. Tensors that are not understood but hold O(length) elements
(attention masks, position ids, document ids) become loads ``T0(b, kv)`` from the node itself. Everything else raises ``Unreadable``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from stem_compile import symbolic
from stem_compile.passes import normalize
from stem_compile.sites import value
from stem_compile.symbolic import FloorDiv, Where


class Unreadable(Exception):
    """The graph says something the reader has no words for; the message names the node."""


@dataclass(frozen=True)
class SymTensor:
    """shape: ints or SymInts. at: index expressions -> value expression (a Boolean for bool tensors). kind: "bool", "int" or "float"."""

    shape: tuple[Any, ...]
    at: Callable[[tuple[Any, ...]], Any]
    kind: str


def kind_of(dtype: torch.dtype) -> str:
    """Arithmetic that a dtype follows."""
    return "bool" if dtype == torch.bool else "float" if dtype.is_floating_point else "int"


def as_expr(number: Any) -> Any:
    """Sympy expression of an int, bool, float or SymInt."""
    if isinstance(number, bool):
        return sympy.true if number else sympy.false
    if isinstance(number, torch.SymInt):
        return number.node.expr
    if isinstance(number, int | float):
        return sympy.sympify(number)
    raise Unreadable(f"scalar of type {type(number).__name__}")


def boolean(expr: Any) -> Any:
    """Truth value of an expression: a condition stays, a number is compared with zero."""
    if expr in (sympy.true, sympy.false) or getattr(expr, "is_Relational", False) or isinstance(expr, sympy.logic.boolalg.Boolean):
        return expr
    if isinstance(expr, Where) and expr.args[1:] == (1, 0):
        return expr.args[0]
    return sympy.Ne(expr, 0)


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


_COMPARE = {"le": sympy.Le, "lt": sympy.Lt, "ge": sympy.Ge, "gt": sympy.Gt, "eq": sympy.Eq, "ne": sympy.Ne}
_LOGIC: dict[str, Any] = {"and": sympy.And, "or": sympy.Or, "xor": sympy.Xor}
_CASTS = {"bool": torch.bool, "long": torch.int64, "int": torch.int32, "float": torch.float32, "half": torch.float16, "double": torch.float64}
_SAME = ("contiguous", "clone", "detach", "alias")


class Interpreter:
    """Reads nodes of one graph. ``leaves`` maps load number -> node, in the order in which loads were met."""

    def __init__(self) -> None:
        self.leaves: list[fx.Node] = []
        self.read_nodes: set[fx.Node] = set()
        self._memo: dict[fx.Node, SymTensor] = {}

    def tensor(self, node: Any) -> SymTensor:
        """Symbolic value of a node, or of a Python number as a 0-d tensor. Raises Unreadable."""
        if not isinstance(node, fx.Node):
            return self._constant(node)
        if node not in self._memo:
            self._memo[node] = self._read(node)
        return self._memo[node]

    def _constant(self, number_: Any) -> SymTensor:
        expr = as_expr(number_)
        return SymTensor((), lambda _: expr, "bool" if isinstance(number_, bool) else "float" if isinstance(number_, float) else "int")

    def _read(self, node: fx.Node) -> SymTensor:
        known = value(node)
        if isinstance(known, int | float | torch.SymInt):
            return self._constant(known)
        if not isinstance(known, torch.Tensor):
            raise Unreadable(f"{node.name} is no tensor")
        self.read_nodes.add(node)
        op = normalize.read(node)
        handler = getattr(self, f"_read_{op.name}", None) if op is not None else None
        try:
            if op is None:
                raise Unreadable(f"{node.name} ({normalize.spelling(node) or node.target})")
            if handler is not None:
                result: SymTensor = handler(op, known)
            else:
                result = self._read_elementwise(op, node)
        except Unreadable:
            return self._leaf(node, known)
        if len(result.shape) != known.dim():
            raise Unreadable(f"{node.name}: rank {len(result.shape)} was read, {known.dim()} recorded")
        return SymTensor(tuple(known.shape), result.at, kind_of(known.dtype))

    def _leaf(self, node: fx.Node, known: torch.Tensor) -> SymTensor:
        # O(length) elements: besides a leading batch dimension, one dimension at most is longer than 1.
        if sum(not is_one(n) for n in known.shape[1:]) > 1 or known.dtype.is_complex or known.dtype.is_floating_point:
            raise Unreadable(f"{node.name} ({normalize.spelling(node) or node.op}) of shape {tuple(map(str, known.shape))}")
        if node not in self.leaves:
            self.leaves.append(node)
        load, shape = symbolic.tensor(self.leaves.index(node)), tuple(known.shape)
        is_bool = known.dtype == torch.bool

        def at(index: tuple[Any, ...]) -> Any:
            loaded = load(*(sympy.Integer(0) if is_one(n) else i for i, n in zip(index, shape, strict=True)))
            return sympy.Ne(loaded, 0) if is_bool else loaded

        return SymTensor(shape, at, kind_of(known.dtype))

    # -- elementwise -------------------------------------------------------------------------------------------------------

    def _read_elementwise(self, op: normalize.Op, node: fx.Node) -> SymTensor:
        if op.name in _COMPARE:
            return self._map(lambda a, b: self._compare(op.name, a, b), op["input"], op["other"])
        if op.name in _LOGIC:
            a, b = self.tensor(op["input"]), self.tensor(op["other"])
            if a.kind == b.kind == "bool":
                return self._map(lambda x, y: _LOGIC[op.name](boolean(x), boolean(y)), op["input"], op["other"])
            raise Unreadable(f"{node.name}: bitwise {op.name} of integers")
        if op.name in ("add", "sub") and op["alpha"] == 1:
            sign = 1 if op.name == "add" else -1
            return self._map(lambda a, b: number(a) + sign * number(b), op["input"], op["other"])
        if op.name == "mul":
            a, b = self.tensor(op["input"]), self.tensor(op["other"])
            if a.kind == b.kind == "bool":
                return self._map(lambda x, y: sympy.And(boolean(x), boolean(y)), op["input"], op["other"])
            return self._map(lambda x, y: number(x) * number(y), op["input"], op["other"])
        if op.name in _SAME:
            return self.tensor(op["input"])
        if op.name in _CASTS:
            return self._cast(op["input"], _CASTS[op.name])
        raise Unreadable(f"{node.name} ({op.name})")

    @staticmethod
    def _compare(name: str, a: Any, b: Any) -> Any:
        a, b = number(a), number(b)
        if name in ("eq", "ne") and isinstance(a, Where) and a.args[1:] == (1, 0) and b in (0, 1):
            # A condition counted as a number and compared with one: the condition, or its opposite.
            return a.args[0] if (name == "eq") == (b == 1) else sympy.Not(a.args[0])
        return _COMPARE[name](a, b)

    def _map(self, function: Callable[..., Any], *nodes: Any) -> SymTensor:
        """Broadcast ``function`` over tensors."""
        parts = [self.tensor(n) for n in nodes]
        rank = max(len(p.shape) for p in parts)

        def at(index: tuple[Any, ...]) -> Any:
            return function(*(p.at(_broadcast_index(index, p.shape)) for p in parts))

        return SymTensor((None,) * rank, at, "")

    def _read_not(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        inner = self.tensor(op["input"])
        if known.dtype != torch.bool:
            raise Unreadable("bitwise not of integers")
        return SymTensor(inner.shape, lambda i: sympy.Not(boolean(inner.at(i))), "bool")

    def _read_neg(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        return self._map(lambda a: -number(a), op["input"])

    def _integer_division(self, op: normalize.Op, function: Any) -> SymTensor:
        divisor = op["other"]
        if isinstance(divisor, int) and divisor > 0 and self.tensor(op["input"]).kind == "int":
            return self._map(lambda a: function(number(a), sympy.Integer(divisor)), op["input"])
        raise Unreadable("division by something other than a positive constant")

    def _read_floordiv(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        return self._integer_division(op, FloorDiv)

    def _read_truediv(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        if op["rounding_mode"] == "floor":
            return self._integer_division(op, FloorDiv)
        raise Unreadable("true division")

    def _read_mod(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        return self._integer_division(op, sympy.Mod)

    def _read_where(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        if known.dtype == torch.bool:
            return self._map(
                lambda c, a, b: sympy.Or(sympy.And(boolean(c), boolean(a)), sympy.And(sympy.Not(boolean(c)), boolean(b))),
                op["condition"],
                op["input"],
                op["other"],
            )
        return self._map(lambda c, a, b: Where(boolean(c), number(a), number(b)), op["condition"], op["input"], op["other"])

    def _read_masked_fill(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        return self._read_where(normalize.Op("where", {"condition": op["mask"], "input": op["value"], "other": op["input"]}), known)

    def _read_minimum(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        return self._map(lambda a, b: sympy.Min(number(a), number(b)), op["input"], op["other"])

    def _read_maximum(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        return self._map(lambda a, b: sympy.Max(number(a), number(b)), op["input"], op["other"])

    # -- casts -------------------------------------------------------------------------------------------------------------

    def _cast(self, node: Any, dtype: torch.dtype) -> SymTensor:
        inner = self.tensor(node)
        target = kind_of(dtype)
        if inner.kind == "float" and target == "int":
            raise Unreadable("float to int")
        convert = boolean if target == "bool" else number
        return SymTensor(inner.shape, lambda i: convert(inner.at(i)), target)

    def _read_to(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        return self._cast(op["input"], known.dtype)

    _read_type = _read_type_as = _read_to

    # -- creation ----------------------------------------------------------------------------------------------------------

    def _read_arange(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        bounds = [value(b) for b in op["bounds"]]
        start, step = (bounds[0], 1) if len(bounds) == 2 else (bounds[0], bounds[2]) if len(bounds) == 3 else (0, 1)
        if any(isinstance(x, float) for x in bounds):
            raise Unreadable("arange of floats")
        return SymTensor((None,), lambda i: as_expr(start) + as_expr(step) * i[0], "int")

    def _filled(self, fill: Any, known: torch.Tensor) -> SymTensor:
        expr = as_expr(value(fill))
        expr = boolean(expr) if known.dtype == torch.bool else number(expr)
        return SymTensor(tuple(known.shape), lambda _: expr, "")

    def _read_ones(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        return self._filled(1, known)

    _read_new_ones = _read_ones_like = _read_ones

    def _read_zeros(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        return self._filled(0, known)

    _read_new_zeros = _read_zeros_like = _read_zeros

    def _read_full(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        return self._filled(op["fill_value"], known)

    _read_new_full = _read_full_like = _read_full

    def _read_tensor(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        if known.dim():
            raise Unreadable("literal tensor")
        return self._filled(op["data"], known)

    _read_scalar_tensor = _read_tensor

    # -- triangles and running sums ----------------------------------------------------------------------------------------

    def _triangle(self, op: normalize.Op, known: torch.Tensor, lower: bool) -> SymTensor:
        inner = self.tensor(op["input"])
        diagonal = as_expr(value(op["diagonal"]))

        def at(index: tuple[Any, ...]) -> Any:
            keep = index[-1] <= index[-2] + diagonal if lower else index[-1] >= index[-2] + diagonal
            inside = inner.at(index)
            return sympy.And(keep, boolean(inside)) if known.dtype == torch.bool else Where(keep, number(inside), sympy.Integer(0))

        return SymTensor(inner.shape, at, inner.kind)

    def _read_tril(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        return self._triangle(op, known, lower=True)

    def _read_triu(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        return self._triangle(op, known, lower=False)

    def _read_diff(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        inner = self.tensor(op["input"])
        dim = op["dim"] % len(inner.shape)
        if op["n"] != 1 or op["append"] is not None:
            raise Unreadable("diff of another order")
        before = None if op["prepend"] is None else self.tensor(op["prepend"])
        if before is not None and not is_one(before.shape[dim]):
            raise Unreadable("diff with a longer prepend")

        def at(index: tuple[Any, ...]) -> Any:
            def step(i: Any) -> Any:
                return (*index[:dim], i, *index[dim + 1 :])

            i = index[dim]
            if before is None:
                return number(inner.at(step(i + 1))) - number(inner.at(step(i)))
            first = number(inner.at(step(sympy.Integer(0)))) - number(before.at(step(sympy.Integer(0))))
            later = number(inner.at(step(i))) - number(inner.at(step(i - 1)))
            first, later = sympy.expand(first), sympy.expand(later)
            if first.atoms(sympy.Function) or later.atoms(sympy.Function):
                raise Unreadable("diff of runtime values")
            return later if first == later else Where(sympy.Eq(i, 0), first, later)

        probe = at(tuple(sympy.Symbol(f"_p{n}", integer=True, nonnegative=True) for n in range(len(inner.shape))))
        del probe  # raises here, not later, when the values are only known at run time
        return SymTensor(inner.shape, at, "int")

    def _read_cumsum(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        inner = self.tensor(op["input"])
        dim = op["dim"] % len(inner.shape)
        index = tuple(sympy.Symbol(f"_c{n}", integer=True, nonnegative=True) for n in range(len(inner.shape)))
        term = number(inner.at(index))
        if term.has(index[dim]) or term.atoms(sympy.Function):
            raise Unreadable("cumsum of values that change along it")
        return SymTensor(inner.shape, lambda i: number(inner.at(i)) * (i[dim] + 1), "int")

    # -- shape -------------------------------------------------------------------------------------------------------------

    def _read_unsqueeze(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        inner, dim = self.tensor(op["input"]), op["dim"] % known.dim()
        return SymTensor((None,) * known.dim(), lambda i: inner.at(i[:dim] + i[dim + 1 :]), inner.kind)

    def _read_squeeze(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        return self._read_reshape(op, known)

    def _read_transpose(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        order = list(range(known.dim()))
        a, b = op["dim0"] % known.dim(), op["dim1"] % known.dim()
        order[a], order[b] = order[b], order[a]
        return self._permuted(op["input"], order)

    def _read_t(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        return self._permuted(op["input"], list(reversed(range(known.dim()))))

    def _read_permute(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        return self._permuted(op["input"], [d % known.dim() for d in op["dims"]])

    def _permuted(self, node: Any, order: list[int]) -> SymTensor:
        inner = self.tensor(node)
        return SymTensor(tuple(inner.shape[d] for d in order), lambda i: inner.at(tuple(i[order.index(d)] for d in range(len(order)))), inner.kind)

    def _read_expand(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        inner = self.tensor(op["input"])
        return SymTensor((None,) * known.dim(), lambda i: inner.at(_broadcast_index(i, inner.shape)), inner.kind)

    _read_expand_as = _read_expand

    def _read_reshape(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        """Reshapes that only add or drop dimensions of size 1."""
        inner = self.tensor(op["input"])
        old = [n for n, size in enumerate(inner.shape) if not is_one(size)]
        new = [n for n, size in enumerate(known.shape) if not is_one(size)]
        if len(old) != len(new) or not all(_same(inner.shape[a], known.shape[b]) for a, b in zip(old, new, strict=True)):
            raise Unreadable("a view that merges or splits dimensions")

        def at(index: tuple[Any, ...]) -> Any:
            back: list[Any] = [sympy.Integer(0)] * len(inner.shape)
            for a, b in zip(old, new, strict=True):
                back[a] = index[b]
            return inner.at(tuple(back))

        return SymTensor(tuple(known.shape), at, inner.kind)

    _read_view = _read_reshape

    def _read_getitem(self, op: normalize.Op, known: torch.Tensor) -> SymTensor:
        inner = self.tensor(op["input"])
        parts = op["index"] if isinstance(op["index"], tuple) else (op["index"],)
        used = sum(p is not None and p is not Ellipsis for p in parts)
        wide: list[Any] = []
        for p in parts:
            wide.extend([slice(None)] * (len(inner.shape) - used) if p is Ellipsis else [p])
        wide += [slice(None)] * (len(inner.shape) - sum(p is not None for p in wide))
        if any(isinstance(p, fx.Node) and isinstance(value(p), torch.Tensor) for p in wide):
            return self._gather(inner, wide, known)

        def at(index: tuple[Any, ...]) -> Any:
            incoming, back = list(index), []
            for p in wide:
                if p is None:
                    incoming.pop(0)
                elif isinstance(p, slice):
                    start, step = value(p.start), value(p.step)
                    back.append((as_expr(start) if start is not None else 0) + incoming.pop(0) * (as_expr(step) if step is not None else 1))
                else:
                    back.append(as_expr(value(p)))
            return inner.at(tuple(back))

        for p in wide:
            start = value(p.start) if isinstance(p, slice) else value(p)
            if start is not None and as_expr(start).is_nonnegative is not True:
                raise Unreadable("an index that counts from the end")
            if isinstance(p, slice) and p.step is not None and as_expr(value(p.step)).is_positive is not True:
                raise Unreadable("a slice that runs backwards")
        return SymTensor((None,) * known.dim(), at, inner.kind)

    def _gather(self, inner: SymTensor, parts: list[Any], known: torch.Tensor) -> SymTensor:
        """``x[i, j]`` with a tensor for every dimension: broadcast the indices, read x there."""
        if len(parts) != len(inner.shape) or not all(isinstance(p, int | fx.Node) for p in parts):
            raise Unreadable("indexing by tensors and slices together")
        indices = [self.tensor(p) for p in parts]
        if any(i.kind != "int" for i in indices):
            raise Unreadable("Boolean indexing")
        return SymTensor((None,) * known.dim(), lambda i: inner.at(tuple(number(t.at(_broadcast_index(i, t.shape))) for t in indices)), inner.kind)


def _broadcast_index(index: tuple[Any, ...], shape: tuple[Any, ...]) -> tuple[Any, ...]:
    """Index of a tensor of ``shape`` inside a broadcast result: trailing dimensions align, size 1 is read at 0."""
    tail = index[len(index) - len(shape) :]
    return tuple(sympy.Integer(0) if is_one(size) else i for i, size in zip(tail, shape, strict=True))


def _same(a: Any, b: Any) -> bool:
    return bool(sympy.expand(as_expr(a) - as_expr(b)) == 0)
