"""Views, slices, gathers and joins: the same values under another index."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from stem_compile.algebra import symbolic
from stem_compile.algebra.symbolic import Where
from stem_compile.passes.graph.normalize import Op
from stem_compile.passes.graph.values import value
from stem_compile.passes.reading.expressions import as_expr, boolean, broadcast_index, is_one, number
from stem_compile.passes.reading.interpret import Interpreter, Reader, SymTensor
from stem_compile.passes.reading.unreadable import Unreadable


def _unsqueeze(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    inner, dim = i.tensor(op["input"]), op["dim"] % known.dim()
    return SymTensor((None,) * known.dim(), lambda at: inner.at(at[:dim] + at[dim + 1 :]), inner.kind)


def _permuted(i: Interpreter, node: Any, order: list[int]) -> SymTensor:
    inner = i.tensor(node)
    return SymTensor(
        tuple(inner.shape[d] for d in order),
        lambda at: inner.at(tuple(at[order.index(d)] for d in range(len(order)))),
        inner.kind,
    )


def _transpose(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    order = list(range(known.dim()))
    a, b = op["dim0"] % known.dim(), op["dim1"] % known.dim()
    order[a], order[b] = order[b], order[a]
    return _permuted(i, op["input"], order)


def _expand(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    inner = i.tensor(op["input"])
    return SymTensor((None,) * known.dim(), lambda at: inner.at(broadcast_index(at, inner.shape)), inner.kind)


def _repeat(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    inner = i.tensor(op["input"])
    sizes = [value(s) for s in op["size"]][known.dim() - len(inner.shape) :]
    if not all(is_one(n) or is_one(times) for n, times in zip(inner.shape, sizes, strict=True)):
        raise Unreadable("a repetition of more than single elements")
    return _expand(i, op, known)


def _reshape(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    """Any reshape whose sizes group: dimensions merged and split with the sizes that Dynamo recorded."""
    inner = i.tensor(op["input"])
    old, new = ([(n, size) for n, size in enumerate(shape) if not is_one(size)] for shape in (inner.shape, known.shape))
    groups: list[tuple[list[tuple[int, Any]], list[tuple[int, Any]]]] = []
    while old or new:
        left, right = [old.pop(0)] if old else [], [new.pop(0)] if new else []
        while (ratio := _ratio(left, right)) != 1:
            # The side with the smaller product takes its next dimension.
            short, rest = (left, old) if (ratio.is_number and ratio < 1) or sympy.numer(ratio) == 1 else (right, new)
            if not rest:
                raise Unreadable("a view whose sizes do not group")
            short.append(rest.pop(0))
        groups.append((left, right))

    def at(index: tuple[Any, ...]) -> Any:
        back: list[Any] = [sympy.Integer(0)] * len(inner.shape)
        for left, right in groups:
            linear = sympy.Integer(0)
            for n, size in right:
                linear = linear * as_expr(size) + index[n]
            for n, size in reversed(left[1:]):
                linear, back[n] = i.divide(linear, size)
            back[left[0][0]] = linear
        return inner.at(tuple(back))

    return SymTensor(tuple(known.shape), at, inner.kind)


def _ratio(left: list[tuple[int, Any]], right: list[tuple[int, Any]]) -> Any:
    """Product of the sizes on the left over those on the right."""
    sides = [sympy.Mul(*(as_expr(size) for _, size in side)) for side in (left, right)]
    return sympy.cancel(sides[0] / sides[1])


def _getitem(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    inner = i.tensor(op["input"])
    parts = op["index"] if isinstance(op["index"], tuple) else (op["index"],)
    used = sum(p is not None and p is not Ellipsis for p in parts)
    wide: list[Any] = []
    for p in parts:
        wide.extend([slice(None)] * (len(inner.shape) - used) if p is Ellipsis else [p])
    wide += [slice(None)] * (len(inner.shape) - sum(p is not None for p in wide))
    if any(isinstance(p, fx.Node) and isinstance(value(p), torch.Tensor) for p in wide):
        return _gather(i, inner, wide, known)
    starts: list[Any] = []
    for p in wide:
        size = inner.shape[len([s for s in starts if s is not None])] if p is not None else None
        start = value(p.start) if isinstance(p, slice) else value(p)
        if isinstance(p, slice) and p.step is not None and as_expr(value(p.step)).is_positive is not True:
            raise Unreadable("a slice that runs backwards")
        starts.append(None if p is None else _from_front(start, size))

    def at(index: tuple[Any, ...]) -> Any:
        incoming, back = list(index), []
        for p, start in zip(wide, starts, strict=True):
            if p is None:
                incoming.pop(0)
            elif isinstance(p, slice):
                back.append(start + incoming.pop(0) * (as_expr(value(p.step)) if p.step is not None else 1))
            else:
                back.append(start)
        return inner.at(tuple(back))

    return SymTensor((None,) * known.dim(), at, inner.kind)


def _from_front(start: Any, size: Any) -> Any:
    """Nonnegative start of a slice, or position of an index."""
    if start is None:
        return sympy.Integer(0)
    expr = as_expr(start)
    if isinstance(start, int) and start < 0:
        expr = as_expr(size) + expr
        if expr.is_Integer and expr < 0:
            expr = sympy.Integer(0)
    if expr.is_nonnegative is not True and not (isinstance(start, torch.SymInt) and bool(start >= 0)):
        # The comparison above installs a guard: the sign is part of what was compiled.
        raise Unreadable("an index that may count from the end")
    return expr


def _gather(i: Interpreter, inner: SymTensor, parts: list[Any], known: torch.Tensor) -> SymTensor:
    """``x[i, j]`` with a tensor for every dimension: broadcast the indices, read x there."""
    if len(parts) != len(inner.shape) or not all(isinstance(p, int | fx.Node) for p in parts):
        raise Unreadable("indexing by tensors and slices together")
    indices = [i.tensor(p) for p in parts]
    if any(t.kind != "int" for t in indices):
        raise Unreadable("Boolean indexing")
    if any(i.bounds(t)[0] < 0 for t in indices):
        raise Unreadable("an index that may count from the end")
    return SymTensor(
        (None,) * known.dim(),
        lambda at: inner.at(tuple(number(t.at(broadcast_index(at, t.shape))) for t in indices)),
        inner.kind,
    )


def _select(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    inner, dim = i.tensor(op["input"]), op["dim"] % (known.dim() + 1)
    place = _from_front(value(op["index"]), inner.shape[dim])
    return SymTensor((None,) * known.dim(), lambda at: inner.at((*at[:dim], place, *at[dim:])), inner.kind)


def _narrow(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    inner, dim = i.tensor(op["input"]), op["dim"] % known.dim()
    start = _from_front(value(op["start"]), inner.shape[dim])
    return SymTensor(
        (None,) * known.dim(), lambda at: inner.at((*at[:dim], at[dim] + start, *at[dim + 1 :])), inner.kind
    )


def _flip(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    inner, dims = i.tensor(op["input"]), {d % known.dim() for d in op["dims"]}
    sizes = [as_expr(n) for n in inner.shape]
    return SymTensor(
        (None,) * known.dim(),
        lambda at: inner.at(tuple(sizes[n] - 1 - a if n in dims else a for n, a in enumerate(at))),
        inner.kind,
    )


def _cat(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    dim, parts = op["dim"] % known.dim(), [i.tensor(t) for t in op["tensors"]]
    if any(len(p.shape) != known.dim() for p in parts):
        raise Unreadable("a join of different ranks")

    def at(index: tuple[Any, ...]) -> Any:
        def from_part(n: int, place: Any) -> Any:
            inside = True if n + 1 == len(parts) else i.below(place, parts[n].shape[dim])
            rest = None if inside is True else from_part(n + 1, symbolic.expand(place - as_expr(parts[n].shape[dim])))
            if inside is False:
                return rest
            here = parts[n].at((*index[:dim], place, *index[dim + 1 :]))
            if inside is True:
                return here
            condition = place < as_expr(parts[n].shape[dim])
            if known.dtype == torch.bool:
                return sympy.Or(sympy.And(condition, boolean(here)), sympy.And(sympy.Not(condition), boolean(rest)))
            return Where(condition, number(here), number(rest))

        return from_part(0, index[dim])

    return SymTensor((None,) * known.dim(), at, "")


def _pad(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    """A constant around a tensor; negative widths cut off."""
    inner, widths = i.tensor(op["input"]), [as_expr(value(w)) for w in op["pad"]]
    if op["mode"] != "constant":
        raise Unreadable(f"padding by {op['mode']}")
    fill = as_expr(value(0 if op["value"] is None else op["value"]))
    rank, before = known.dim(), {known.dim() - 1 - n // 2: w for n, w in enumerate(widths) if n % 2 == 0}

    def at(index: tuple[Any, ...]) -> Any:
        places = tuple(a - before.get(n, 0) for n, a in enumerate(index))
        inside: list[Any] = []
        for n in range(rank):
            if before.get(n, 0) != 0:
                inside.append(sympy.Ge(places[n], 0))
            if n in before and i.below(places[n], inner.shape[n]) is not True:
                inside.append(sympy.Lt(places[n], as_expr(inner.shape[n])))
        condition = sympy.And(*inside)
        if condition == sympy.false:
            return boolean(fill) if known.dtype == torch.bool else number(fill)
        here = inner.at(places)
        if known.dtype == torch.bool:
            return sympy.Or(sympy.And(condition, boolean(here)), sympy.And(sympy.Not(condition), boolean(fill)))
        return Where(condition, number(here), number(fill))

    return SymTensor((None,) * rank, at, inner.kind)


def _stack(i: Interpreter, op: Op, known: torch.Tensor) -> SymTensor:
    if len(op["tensors"]) != 1:
        raise Unreadable("a stack")
    return _unsqueeze(i, Op("unsqueeze", {"input": op["tensors"][0], "dim": op["dim"]}), known)


READERS: dict[str, Reader] = {
    "unsqueeze": _unsqueeze,
    "transpose": _transpose,
    "getitem": _getitem,
    "select": _select,
    "narrow": _narrow,
    "flip": _flip,
    "t": lambda i, op, known: _permuted(i, op["input"], list(reversed(range(known.dim())))),
    "permute": lambda i, op, known: _permuted(i, op["input"], [d % known.dim() for d in op["dims"]]),
    "expand": _expand,
    "expand_as": _expand,
    "repeat": _repeat,
    "cat": _cat,
    "pad": _pad,
    "stack": _stack,
    **dict.fromkeys(("view", "reshape", "squeeze", "flatten", "unflatten", "view_as", "reshape_as"), _reshape),
}
