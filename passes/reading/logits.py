"""The logits of an attention written out, as one expression in ``SCORE``, the raw product of a query and a key.

Logits have four dimensions (batch, head, query, key); five where query heads are grouped under key heads; three or two
where there is a batch alone or nothing beside queries and keys. Whatever their layout, they are read at (b, h, q, kv).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from stem_compile.algebra import symbolic
from stem_compile.algebra.symbolic import KV, SCORE, B, FloorDiv, H, Q
from stem_compile.passes.graph import normalize
from stem_compile.passes.graph.memory import functional
from stem_compile.passes.graph.products import ADDS
from stem_compile.passes.graph.values import value
from stem_compile.passes.reading.expressions import as_expr, broadcast_index, number
from stem_compile.passes.reading.interpret import Interpreter, SymTensor
from stem_compile.passes.reading.unreadable import Unreadable

GROUP, MEMBER = sympy.symbols("_group _member", integer=True, nonnegative=True)
"""Key head, and query head within its group, while grouped logits are read."""


@dataclass(frozen=True)
class Logits:
    """expr: logit of (b, h, q, kv). sink: logit that every row's softmax has beside the keys', None without one.
    dtype: of the softmax's input."""

    expr: Any
    sink: Any
    dtype: torch.dtype


def read_logits(
    source: fx.Node, product: fx.Node, shape: tuple[Any, Any, Any], first: int, interpreter: Interpreter
) -> Logits:
    """Logits in ``source``, computed from ``product``.

    shape: (heads, q_len, kv_len). first: columns in front of the keys'. Raises Unreadable.
    """
    heads, _, kv_len = shape
    wide = value(source).shape
    grouped = len(wide) == 5
    members = as_expr(wide[2]) if grouped else None
    given = _product_tensor(product, len(wide), heads, members, interpreter)
    extents = interpreter.extents | ({GROUP: wide[1], MEMBER: wide[2]} if grouped else {})
    interpreter.focus({product: given}, extents)
    tensor = interpreter.tensor(source)
    outer = {2: (), 3: (B,), 4: (B, H), 5: (B, GROUP, MEMBER)}.get(len(wide))
    if outer is None:
        raise Unreadable(f"{source.name} has {len(wide)} dimensions")

    def at(column: Any) -> Any:
        expr = sympy.sympify(number(tensor.at(broadcast_index((*outer, Q, column), tensor.shape))))
        return _by_head(expr, members) if grouped else expr

    extra = symbolic.expand(as_expr(tensor.shape[-1]) - as_expr(kv_len))
    if extra not in (0, 1) or (first and extra != first):
        raise Unreadable(f"{source.name}: {extra} columns beside the scores")
    sink = None
    if extra == 1:
        sink = at(sympy.Integer(0) if first else as_expr(kv_len))
        if sink.has(SCORE):
            raise Unreadable("a column beside the scores that is no sink")
    return Logits(at(KV + first), sink, value(source).dtype)


def _product_tensor(node: fx.Node, rank: int, heads: Any, members: Any, interpreter: Interpreter) -> SymTensor:
    """The raw product as a symbolic tensor: ``SCORE`` where it is read at its own place, for logits of ``rank``
    dimensions."""
    shape = tuple(value(node).shape)
    op = normalize.read(node) or functional(node)
    head = H if members is None else GROUP * members + MEMBER
    outer: tuple[Any, ...]
    if len(shape) == 5:
        size = as_expr(shape[2])
        outer = (B, FloorDiv(H, size), sympy.Mod(H, size)) if members is None else (B, GROUP, MEMBER)
    elif len(shape) == 4:
        outer = (B, head)
    elif len(shape) == 3:
        outer = (symbolic.expand(B * as_expr(heads) + head),) if rank > 3 else (B,)
    else:
        outer = ()
    place = (*outer, Q, KV)

    def at(index: tuple[Any, ...]) -> Any:
        if not all(n == 1 or _is_zero(i - p) for i, p, n in zip(index, place, shape, strict=True)):
            raise Unreadable(f"{node.name} is read at {index}")
        if op is None or op.name not in ADDS:
            return SCORE
        beta, alpha = as_expr(value(op["beta"])), as_expr(value(op["alpha"]))
        if beta == 0:
            return alpha * SCORE
        added = interpreter.tensor(op["input"])
        return alpha * SCORE + beta * number(added.at(broadcast_index(index, added.shape)))

    return SymTensor(shape, at, "float")


def _is_zero(expr: Any) -> bool:
    """Whether an index expression is 0, where quotients and remainders of one division may cancel."""
    whole = {m: m.args[0] - m.args[1] * FloorDiv(*m.args) for m in expr.atoms(sympy.Mod)}
    return bool(symbolic.expand(expr.xreplace(whole)) == 0)


def _by_head(expr: Any, members: Any) -> Any:
    """An expression of key head and member as one of the query head, ``h = group * members + member``."""
    whole: Callable[[Any], Any] = lambda e: symbolic.expand(e.subs(GROUP, (H - MEMBER) / members))  # noqa: E731
    places = {
        load: load.func(*(p if (p := whole(a)).free_symbols.isdisjoint({GROUP, MEMBER}) else a for a in load.args))
        for load in expr.atoms(sympy.core.function.AppliedUndef)
        if symbolic.load_index(load) is not None
    }
    return expr.xreplace(places).subs({GROUP: FloorDiv(H, members), MEMBER: sympy.Mod(H, members)})
