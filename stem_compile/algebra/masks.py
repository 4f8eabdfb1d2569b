"""Mask algebra: what an attention mask means, independent of how a graph builds it.

A mask says for (b, h, q, kv) whether query row q may see key kv. Terms have names that a model author knows; every term
is a sympy predicate underneath, so one definition serves the dense oracle (``dense``), block maps (``classify``),
kernels (printed as Triton by ``kernels/triton/codegen.py``) and words (``words``). A mask travels through FX graphs and
operator schemas as text: ``encode``/``decode``.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import sympy
import torch

from stem_compile.algebra import symbolic, text
from stem_compile.algebra.symbolic import KV, KV_LEN, Q_LEN, B, H, Q


class Block(enum.Enum):
    """What a mask does to one rectangle of scores."""

    EMPTY = 0
    PARTIAL = 1
    FULL = 2


@dataclass(frozen=True)
class Mask:
    """Base of the algebra. Combine with ``&``, ``|`` and ``~``; a mask has no truth value of its own."""

    @property
    def predicate(self) -> Any:
        """Sympy Boolean in ``symbolic``'s symbols: true where the key is visible."""
        raise NotImplementedError(type(self).__name__)

    @property
    def words(self) -> str:
        """The mask as a model author would say it."""
        raise NotImplementedError(type(self).__name__)

    @property
    def lowest(self) -> Any:
        """Sympy expression, nondecreasing in ``Q``, below which query Q sees no key; None where the mask has no such
        edge."""
        return None

    def __and__(self, other: Mask) -> Mask:
        return _combine(And, self, other)

    def __or__(self, other: Mask) -> Mask:
        return _combine(Or, self, other)

    def __invert__(self) -> Mask:
        return predicate(sympy.Not(self.predicate))

    def __bool__(self) -> bool:
        raise TypeError("a mask has no truth value; combine masks with & and |, compare them with ==")

    def dense(
        self,
        shape: tuple[int, int, int, int],
        tensors: Sequence[torch.Tensor] = (),
        scalars: Sequence[int] = (),
        device: torch.device | str = "cpu",
        rows: slice | torch.Tensor = slice(None),
    ) -> torch.Tensor:
        """Bool tensor broadcastable to ``shape`` = (batch, heads, q_len, kv_len); True is visible.

        tensors: the site's mask tensors, indexed as the predicate indexes them. scalars: values of S0, S1, ...
        rows: query rows wanted, or their numbers; the third dimension of the answer is theirs.
        """
        axes = [torch.arange(n, device=device) for n in shape]
        index = [a.view([-1 if i == j else 1 for j in range(4)]) for i, a in enumerate(axes)]
        env = environment(shape, tensors, scalars)
        env |= {B: index[0], H: index[1], Q: index[2][:, :, rows], KV: index[3]}
        value = symbolic.evaluate(self.predicate, env)
        return value if isinstance(value, torch.Tensor) else torch.full((1, 1, 1, 1), value, device=device)

    def classify(
        self,
        rows: tuple[int, int],
        keys: tuple[int, int],
        shape: tuple[int, int, int, int],
        scalars: Sequence[int] = (),
    ) -> Block:
        """Empty, partial or full over query rows [rows) x keys [keys), by interval arithmetic: PARTIAL when it cannot
        tell."""
        box = {s: (v, v) for s, v in environment(shape, (), scalars).items()}
        box |= {Q: (rows[0], rows[1] - 1), KV: (keys[0], keys[1] - 1), B: (0, shape[0] - 1), H: (0, shape[1] - 1)}
        certainly, possibly = symbolic.bounds(self.predicate, box)
        return Block.FULL if certainly else Block.PARTIAL if possibly else Block.EMPTY


def environment(
    shape: tuple[int, int, int, int], tensors: Sequence[torch.Tensor], scalars: Sequence[int]
) -> dict[Any, Any]:
    """Bindings of a site's lengths, scalars and mask tensors for ``symbolic.evaluate``."""
    env: dict[Any, Any] = {Q_LEN: shape[2], KV_LEN: shape[3]}
    env |= {symbolic.scalar(i): value for i, value in enumerate(scalars)}
    return env | {symbolic.tensor(i): _loader(t) for i, t in enumerate(tensors)}


def _loader(values: torch.Tensor) -> Any:
    def load(*index: Any) -> torch.Tensor:
        # Broadcast dimensions are read at 0; out-of-range reads are another conjunct's business, so clamp like a masked
        # load. At least one dimension each: a 0-d index would be read back to the host.
        places = (torch.atleast_1d(symbolic.as_tensor(i, values.device)) for i in index)
        return symbolic.widened(values[tuple(i.clamp(0, n - 1) for i, n in zip(places, values.shape, strict=True))])

    return load


@dataclass(frozen=True)
class Full(Mask):
    """Every key is visible."""

    predicate: ClassVar[Any] = sympy.true
    words: ClassVar[str] = "full"


@dataclass(frozen=True)
class Causal(Mask):
    """``kv <= q + offset``. ``offset``: keys before the first query row; an int or a sympy expression of lengths and
    scalars."""

    offset: Any = 0

    @property
    def predicate(self) -> Any:
        return sympy.Le(KV, Q + self.offset)

    @property
    def words(self) -> str:
        return "causal" if self.offset == 0 else f"causal(offset={self.offset})"


@dataclass(frozen=True)
class Padding(Mask):
    """Keys of one batch row are visible where mask tensor number ``index`` (bool or int, read at (b, kv)) is nonzero;
    ``whole``: is at least 1."""

    index: int = 0
    batched: bool = True
    whole: bool = False

    @property
    def predicate(self) -> Any:
        load = symbolic.tensor(self.index)(B if self.batched else sympy.Integer(0), KV)
        return sympy.Ge(load, 1) if self.whole else sympy.Ne(load, 0)

    words: ClassVar[str] = "padding"


@dataclass(frozen=True)
class Window(Mask):
    """``kv >= q + offset``: the far edge of a sliding window. ``offset`` as in ``Causal``, usually negative."""

    offset: Any = 0

    @property
    def predicate(self) -> Any:
        return sympy.Ge(KV, Q + self.offset)

    @property
    def lowest(self) -> Any:
        return Q + self.offset

    @property
    def words(self) -> str:
        return f"window from {self.offset:+}" if isinstance(self.offset, int) else f"window from {self.offset}"


@dataclass(frozen=True)
class Chunks(Mask):
    """Query and key lie in one chunk of ``size`` positions. q_shift, kv_shift: position of query 0 and key 0 (may
    depend on the batch row)."""

    size: int
    q_shift: Any = 0
    kv_shift: Any = 0

    @property
    def predicate(self) -> Any:
        return sympy.Eq(
            symbolic.FloorDiv(Q + self.q_shift, self.size),
            symbolic.FloorDiv(KV + self.kv_shift, self.size),
            evaluate=False,
        )

    @property
    def lowest(self) -> Any:
        return symbolic.FloorDiv(Q + self.q_shift, self.size) * self.size - self.kv_shift

    @property
    def words(self) -> str:
        return f"chunks of {self.size}"


@dataclass(frozen=True)
class Documents(Mask):
    """Query and key carry the same id: mask tensor number ``index`` [B or 1, N], read at (b, q + q_shift) and (b, kv +
    kv_shift)."""

    expr: Any
    words: ClassVar[str] = "documents"

    @property
    def predicate(self) -> Any:
        return self.expr


@dataclass(frozen=True)
class Positions(Mask):
    """The key's position, read from a tensor at (b, kv), does not exceed the query's, read at (b, q)."""

    expr: Any
    words: ClassVar[str] = "causal by positions"

    @property
    def predicate(self) -> Any:
        return self.expr


@dataclass(frozen=True)
class Given(Mask):
    """A mask that was not understood, kept as a tensor: mask tensor of the site, broadcastable to (batch, heads, q_len,
    kv_len)."""

    expr: Any
    words: ClassVar[str] = "given as a tensor"

    @property
    def predicate(self) -> Any:
        return self.expr


@dataclass(frozen=True)
class Predicate(Mask):
    """A predicate that is understood but has no name of its own."""

    expr: Any

    @property
    def predicate(self) -> Any:
        return self.expr

    @property
    def words(self) -> str:
        return f"[{self.expr}]"


@dataclass(frozen=True)
class And(Mask):
    """Conjunction of named terms."""

    terms: tuple[Mask, ...]

    @property
    def predicate(self) -> Any:
        return sympy.And(*(t.predicate for t in self.terms))

    @property
    def lowest(self) -> Any:
        edges = [t.lowest for t in self.terms if t.lowest is not None]
        return sympy.Max(*edges) if len(edges) > 1 else edges[0] if edges else None

    @property
    def words(self) -> str:
        causal = next((t for t in self.terms if isinstance(t, Causal)), None)
        parts = []
        for term in self.terms:
            if isinstance(term, Window) and causal is not None:
                # kv <= q + causal.offset and kv >= q + window.offset
                parts.append(f"sliding window of {symbolic.expand(causal.offset - term.offset + 1)}")
            else:
                parts.append(f"({term.words})" if isinstance(term, Or) else term.words)
        return " & ".join(parts)


@dataclass(frozen=True)
class Or(Mask):
    """Disjunction of named terms."""

    terms: tuple[Mask, ...]

    @property
    def predicate(self) -> Any:
        return sympy.Or(*(t.predicate for t in self.terms))

    @property
    def words(self) -> str:
        return " | ".join(f"({t.words})" if isinstance(t, And) else t.words for t in self.terms)


@dataclass(frozen=True)
class Opaque(Mask):
    """A mask that was not understood: its tensor stays in the graph. ``reason`` says which node stopped the reading."""

    reason: str = ""

    @property
    def words(self) -> str:
        return "opaque"


def _combine(kind: Any, *masks: Mask) -> Mask:
    """Flatten, drop neutral elements and repetitions; keep the order in which terms were written."""
    neutral, absorbing = (sympy.true, sympy.false) if kind is And else (sympy.false, sympy.true)
    terms: list[Mask] = []
    for mask in masks:
        for term in mask.terms if isinstance(mask, kind) else (mask,):
            if isinstance(term, Opaque):
                return term
            if term.predicate == absorbing:
                return term
            if term.predicate != neutral and term not in terms:
                terms.append(term)
    if not terms:
        return predicate(neutral)
    return terms[0] if len(terms) == 1 else kind(tuple(terms))


def predicate(expr: Any) -> Mask:
    """Mask of a sympy Boolean, with every conjunct and disjunct that has a name given its name."""
    expr = sympy.sympify(expr)
    if expr == sympy.true:
        return Full()
    if isinstance(expr, sympy.Not):
        expr = sympy.to_nnf(expr, simplify=False)
    if isinstance(expr, sympy.And):
        return functools.reduce(Mask.__and__, (predicate(a) for a in _ordered(expr.args)))
    if isinstance(expr, sympy.Or):
        return functools.reduce(Mask.__or__, (predicate(a) for a in _ordered(expr.args)))
    for recognise in _RECOGNISERS:
        if (term := recognise(expr)) is not None:
            return term
    return Predicate(expr)


def _ordered(args: Any) -> list[Any]:
    # Causal before padding before the rest, independent of sympy's hash order.
    return sorted(args, key=lambda a: (bool(a.atoms(sympy.Function)), not a.has(KV), sympy.default_sort_key(a)))


def _edge(expr: Any) -> tuple[int, Any] | None:
    """(sign, offset) of ``sign * (q + offset - kv) >= 0``; None for anything else. The offset is one for all positions:
    lengths, scalars, ``T0()``."""
    if not isinstance(expr, sympy.Le | sympy.Lt | sympy.Ge | sympy.Gt):
        return None
    slack = symbolic.expand(expr.gts - expr.lts)
    # Whole numbers: kv / 3 <= q / 3 is kv <= q, and a < b is a <= b - 1.
    slack = symbolic.expand(
        slack * sympy.ilcm(1, *(c.q for c in slack.as_coefficients_dict().values() if c.is_Rational))
    )
    slack -= 1 if isinstance(expr, sympy.Lt | sympy.Gt) else 0
    factor = slack.coeff(Q)
    if not factor.is_Integer or factor == 0 or slack.coeff(KV) != -factor:
        return None
    rest = symbolic.expand(slack - factor * Q + factor * KV)
    offset = symbolic.FloorDiv(rest, factor) if factor > 0 else -symbolic.FloorDiv(rest, -factor)
    if offset.has(Q, KV, B, H) or any(
        symbolic.load_index(f) is None or f.args for f in offset.atoms(sympy.core.function.AppliedUndef)
    ):
        return None
    return (1 if factor > 0 else -1), (int(offset) if offset.is_Integer else offset)


def _causal(expr: Any) -> Mask | None:
    edge = _edge(expr)
    return Causal(edge[1]) if edge and edge[0] > 0 else None


def _window(expr: Any) -> Mask | None:
    edge = _edge(expr)
    return Window(edge[1]) if edge and edge[0] < 0 else None


def _chunks(expr: Any) -> Mask | None:
    sides: tuple[Any, ...] = expr.args if isinstance(expr, sympy.Eq) else ()
    if (
        len(sides) != 2
        or not all(isinstance(s, symbolic.FloorDiv) for s in sides)
        or sides[0].args[1] != sides[1].args[1]
    ):
        return None
    row, key = sides if sides[0].has(Q) else sides[::-1]
    size, shifts = row.args[1], (symbolic.expand(row.args[0] - Q), symbolic.expand(key.args[0] - KV))
    if not size.is_Integer or any(s.has(Q, KV, H) for s in shifts):
        return None
    return Chunks(int(size), *(int(s) if s.is_Integer else s for s in shifts))


def _documents(expr: Any) -> Mask | None:
    sides: tuple[Any, ...] = expr.args if isinstance(expr, sympy.Eq) else ()
    if (
        len(sides) == 2
        and all(symbolic.load_index(s) is not None for s in sides)
        and {s.has(Q) for s in sides} == {s.has(KV) for s in sides} == {True, False}
    ):
        return Documents(expr)
    return None


def _positions(expr: Any) -> Mask | None:
    if not isinstance(expr, sympy.Le | sympy.Lt | sympy.Ge | sympy.Gt):
        return None
    small, large = expr.lts, expr.gts
    both = symbolic.load_index(small) is not None and symbolic.load_index(small) == symbolic.load_index(large)
    return (
        Positions(expr) if both and small.has(KV) and large.has(Q) and not small.has(Q) and not large.has(KV) else None
    )


def _given(expr: Any) -> Mask | None:
    load = expr.lhs if expr.is_Relational and expr.rhs.is_number else None
    return (
        Given(expr)
        if load is not None and symbolic.load_index(load) is not None and {Q, KV} <= load.free_symbols
        else None
    )


def _padding(expr: Any) -> Mask | None:
    whole = isinstance(expr, sympy.Ge) and expr.rhs == 1
    index = symbolic.load_index(expr.lhs) if whole or (isinstance(expr, sympy.Ne) and expr.rhs == 0) else None
    if index is None or expr.lhs.args not in ((B, KV), (sympy.Integer(0), KV)):
        return None
    return Padding(index, batched=expr.lhs.args[0] == B, whole=whole)


_RECOGNISERS = (_causal, _window, _chunks, _documents, _positions, _padding, _given)


def encode(mask: Mask) -> str:
    """Canonical text of a mask's predicate; equal masks give equal text. Inverse: ``decode``.

    Raises OutsideAlgebra (a TypeError) for a predicate that holds more than the algebra does.
    """
    return text.encode(mask.predicate)


@functools.lru_cache(maxsize=1024)
def decode(encoded: str) -> Mask:
    """Mask of the text that ``encode`` wrote. Raises ValueError for anything else."""
    try:
        return predicate(text.decode(encoded))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"not an encoded mask: {encoded!r} ({error})") from error
