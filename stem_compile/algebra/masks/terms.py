"""The named terms of masks. Each is one class: its predicate, its words, the geometry that kernels use, and the
recogniser that finds it in a predicate. A new one is a class like these; ``mask.register`` adds it from outside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy

from stem_compile.algebra import symbolic
from stem_compile.algebra.masks.mask import Mask, register
from stem_compile.algebra.symbolic import KV, B, FloorDiv, H, Q


def _edge(expr: Any) -> tuple[int, Any] | None:
    """(sign, offset) of ``sign * (q + offset - kv) >= 0``; None for anything else. The offset is one whole number for
    all positions: of lengths, scalars and ``T0()``."""
    if not isinstance(expr, sympy.Le | sympy.Lt | sympy.Ge | sympy.Gt):
        return None
    slack = symbolic.expand(expr.gts - expr.lts)
    # Whole numbers: kv / 3 <= q / 3 is kv <= q, and a < b is a <= b - 1.
    fractions = [c.q for c in slack.as_coefficients_dict().values() if c.is_Rational and c.is_finite]
    slack = symbolic.expand(slack * math.lcm(*(int(q) for q in fractions)))
    slack -= 1 if isinstance(expr, sympy.Lt | sympy.Gt) else 0
    factor = slack.coeff(Q)
    if not factor.is_Integer or factor == 0 or slack.coeff(KV) != -factor:
        return None
    rest = symbolic.expand(slack - factor * Q + factor * KV)
    loads = symbolic.loads(rest)
    if rest.has(Q, KV, B, H) or any(f.args for f in loads) or not rest.xreplace(_as_integers(loads)).is_integer:
        return None
    offset = FloorDiv(rest, factor) if factor > 0 else -FloorDiv(rest, -factor)
    return (1 if factor > 0 else -1), (int(offset) if offset.is_Integer else offset)


def _as_integers(loads: set[Any]) -> dict[Any, Any]:
    return {f: sympy.Dummy(integer=True) for f in loads}


@register
@dataclass(frozen=True)
class Causal(Mask):
    """``kv <= q + offset``. ``offset``: keys before the first query row; an int or a sympy expression of lengths and
    scalars."""

    offset: Any = 0
    is_interval: ClassVar[bool] = True

    @classmethod
    def recognise(cls, expr: Any) -> Mask | None:
        edge = _edge(expr)
        return cls(edge[1]) if edge and edge[0] > 0 else None

    @property
    def predicate(self) -> Any:
        return sympy.Le(KV, Q + self.offset)

    @property
    def near(self) -> Any:
        return Q + self.offset

    @property
    def causal_offset(self) -> Any:
        return self.offset

    def orders_positions(self, learned: frozenset[int] = frozenset()) -> bool:
        return True

    @property
    def words(self) -> str:
        return "causal" if self.offset == 0 else f"causal(offset={self.offset})"


@register
@dataclass(frozen=True)
class Window(Mask):
    """``kv >= q + offset``: the far edge of a sliding window. ``offset`` as in ``Causal``, usually negative."""

    offset: Any = 0
    is_interval: ClassVar[bool] = True

    @classmethod
    def recognise(cls, expr: Any) -> Mask | None:
        edge = _edge(expr)
        return cls(edge[1]) if edge and edge[0] < 0 else None

    @property
    def predicate(self) -> Any:
        return sympy.Ge(KV, Q + self.offset)

    @property
    def far(self) -> Any:
        return Q + self.offset

    @property
    def words(self) -> str:
        return f"window from {self.offset:+}" if isinstance(self.offset, int) else f"window from {self.offset}"

    def words_beside(self, terms: Sequence[Mask]) -> str:
        causal = next((t.causal_offset for t in terms if t.causal_offset is not None), None)
        # kv <= q + causal and kv >= q + self.offset
        return self.words if causal is None else f"sliding window of {symbolic.expand(causal - self.offset + 1)}"


@register
@dataclass(frozen=True)
class Chunks(Mask):
    """Query and key lie in one chunk of ``size`` positions. q_shift, kv_shift: position of query 0 and key 0 (may
    depend on the batch row)."""

    size: int
    q_shift: Any = 0
    kv_shift: Any = 0
    is_interval: ClassVar[bool] = True

    @classmethod
    def recognise(cls, expr: Any) -> Mask | None:
        sides: tuple[Any, ...] = expr.args if isinstance(expr, sympy.Eq) else ()
        if len(sides) != 2 or not all(isinstance(s, FloorDiv) for s in sides) or sides[0].args[1] != sides[1].args[1]:
            return None
        row, key = sides if sides[0].has(Q) else sides[::-1]
        size, shifts = row.args[1], (symbolic.expand(row.args[0] - Q), symbolic.expand(key.args[0] - KV))
        if not size.is_Integer or size <= 0 or any(s.has(Q, KV, H) for s in shifts):
            return None
        return cls(int(size), *(int(s) if s.is_Integer else s for s in shifts))

    @property
    def predicate(self) -> Any:
        return sympy.Eq(FloorDiv(Q + self.q_shift, self.size), FloorDiv(KV + self.kv_shift, self.size), evaluate=False)

    @property
    def far(self) -> Any:
        return FloorDiv(Q + self.q_shift, self.size) * self.size - self.kv_shift

    @property
    def near(self) -> Any:
        return self.far + self.size - 1

    def reaches(self, offset: Any) -> bool:
        # A chunk ends no earlier than its query's own position.
        return bool(symbolic.expand(sympy.sympify(offset) + self.kv_shift - self.q_shift).is_nonpositive)

    @property
    def words(self) -> str:
        return f"chunks of {self.size}"


@dataclass(frozen=True)
class _Read(Mask):
    """A term that is a comparison of loads, kept as it was read."""

    expr: Any

    @property
    def predicate(self) -> Any:
        return self.expr


@register
@dataclass(frozen=True)
class Documents(_Read):
    """Query and key carry the same id: two loads, one at the query and one at the key, are equal."""

    words: ClassVar[str] = "documents"

    @classmethod
    def recognise(cls, expr: Any) -> Mask | None:
        sides: tuple[Any, ...] = expr.args if isinstance(expr, sympy.Eq) else ()
        loads = len(sides) == 2 and all(symbolic.load_index(s) is not None for s in sides)
        places = {s.has(Q) for s in sides}, {s.has(KV) for s in sides}
        return cls(expr) if loads and places == ({True, False}, {True, False}) else None


@register
@dataclass(frozen=True)
class Positions(_Read):
    """The key's position, read from a tensor at (b, kv), does not exceed the query's, read at (b, q)."""

    words: ClassVar[str] = "causal by positions"

    @classmethod
    def recognise(cls, expr: Any) -> Mask | None:
        if not isinstance(expr, sympy.Le | sympy.Lt | sympy.Ge | sympy.Gt):
            return None
        small, large = expr.lts, expr.gts
        if symbolic.load_index(small) is None or symbolic.load_index(small) != symbolic.load_index(large):
            return None
        at_key, at_query = small.has(KV) and not small.has(Q), large.has(Q) and not large.has(KV)
        return cls(expr) if at_key and at_query else None

    def orders_positions(self, learned: frozenset[int] = frozenset()) -> bool:
        return True


@register
@dataclass(frozen=True)
class Padding(Mask):
    """Keys of one batch row are visible where mask tensor number ``index`` (bool or int, read at (b, kv)) is nonzero;
    ``whole``: is at least 1."""

    index: int = 0
    batched: bool = True
    whole: bool = False
    words: ClassVar[str] = "padding"

    @classmethod
    def recognise(cls, expr: Any) -> Mask | None:
        whole = isinstance(expr, sympy.Ge) and expr.rhs == 1
        index = symbolic.load_index(expr.lhs) if whole or (isinstance(expr, sympy.Ne) and expr.rhs == 0) else None
        if index is None or expr.lhs.args not in ((B, KV), (sympy.Integer(0), KV)):
            return None
        return cls(index, batched=expr.lhs.args[0] == B, whole=whole)

    @property
    def predicate(self) -> Any:
        load = symbolic.tensor(self.index)(B if self.batched else sympy.Integer(0), KV)
        return sympy.Ge(load, 1) if self.whole else sympy.Ne(load, 0)


@register
@dataclass(frozen=True)
class Given(_Read):
    """A mask that was not understood, kept as a tensor: mask tensor of the site, broadcastable to (batch, heads, q_len,
    kv_len)."""

    words: ClassVar[str] = "given as a tensor"

    @classmethod
    def recognise(cls, expr: Any) -> Mask | None:
        # An entry is compared with a constant, or with one far below the greatest of its row.
        side = expr.lhs if expr.is_Relational and expr.rhs.is_number else None
        terms = sympy.Add.make_args(side) if side is not None else ()
        loads = [t for t in terms if symbolic.load_index(t) is not None and {Q, KV} <= t.free_symbols]
        others = [t for t in terms if t not in loads]
        rows = [t for t in others if symbolic.load_index(-t) is not None and not t.has(KV)]
        return cls(expr) if len(loads) == 1 and len(rows) == len(others) <= 1 else None

    def orders_positions(self, learned: frozenset[int] = frozenset()) -> bool:
        # It is taken to, since it may come from outside; a bias that the model computes from its weights is no mask.
        return not {symbolic.load_index(f) for f in symbolic.loads(self.expr)} <= learned
