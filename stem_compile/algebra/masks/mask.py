"""What every mask is and can do, how masks combine, and how a predicate is given the names of its terms."""

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

    @classmethod
    def recognise(cls, expr: Any) -> Mask | None:
        """The term that a predicate (no conjunction, disjunction or negation) is an instance of; None for another's."""
        return None

    @property
    def far(self) -> Any:
        """Sympy expression, nondecreasing in ``Q``: the first key that query ``Q`` may see. None where the mask has no
        such edge."""
        return None

    @property
    def near(self) -> Any:
        """Sympy expression, nondecreasing in ``Q``: the last key that query ``Q`` may see. None where the mask has no
        such edge."""
        return None

    @property
    def causal_offset(self) -> Any:
        """n where the mask is exactly ``kv <= q + n``; None for any other mask."""
        return None

    @property
    def is_interval(self) -> bool:
        """Whether query ``Q`` sees exactly the keys from ``far`` to ``near``; an edge that is None bounds nothing."""
        return False

    def reaches(self, offset: Any) -> bool:
        """Whether ``near`` surely is no earlier than ``q + offset``, for all queries."""
        return self.near is None

    def orders_positions(self, learned: frozenset[int] = frozenset()) -> bool:
        """Whether later keys are hidden from earlier queries, so that budgets falling with position mean something.
        learned: numbers of tensors that the model computes from its weights: biases rather than masks."""
        return False

    def words_beside(self, terms: Sequence[Mask]) -> str:
        """``words`` as one of the conjunction ``terms``."""
        return self.words

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
    is_interval: ClassVar[bool] = True


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

    def orders_positions(self, learned: frozenset[int] = frozenset()) -> bool:
        # Runtime positions: an inequality between what is read at the query and what is read at the key.
        inequality = isinstance(self.expr, sympy.Le | sympy.Lt | sympy.Ge | sympy.Gt)
        return bool(inequality and symbolic.loads(self.expr) and {Q, KV} <= self.expr.free_symbols)


@dataclass(frozen=True)
class And(Mask):
    """Conjunction of named terms."""

    terms: tuple[Mask, ...]

    @property
    def predicate(self) -> Any:
        return sympy.And(*(t.predicate for t in self.terms))

    @property
    def far(self) -> Any:
        edges = [t.far for t in self.terms if t.far is not None]
        return sympy.Max(*edges) if edges else None

    @property
    def near(self) -> Any:
        edges = [t.near for t in self.terms if t.near is not None]
        return sympy.Min(*edges) if edges else None

    @property
    def is_interval(self) -> bool:
        return all(t.is_interval for t in self.terms)

    def orders_positions(self, learned: frozenset[int] = frozenset()) -> bool:
        return any(t.orders_positions(learned) for t in self.terms)

    @property
    def words(self) -> str:
        parts = [t.words_beside(self.terms) for t in self.terms]
        return " & ".join(f"({w})" if isinstance(t, Or) else w for t, w in zip(self.terms, parts, strict=True))


@dataclass(frozen=True)
class Or(Mask):
    """Disjunction of named terms."""

    terms: tuple[Mask, ...]

    @property
    def predicate(self) -> Any:
        return sympy.Or(*(t.predicate for t in self.terms))

    def orders_positions(self, learned: frozenset[int] = frozenset()) -> bool:
        return any(t.orders_positions(learned) for t in self.terms)

    @property
    def words(self) -> str:
        return " | ".join(f"({t.words})" if isinstance(t, And) else t.words for t in self.terms)


def _combine(kind: type[And] | type[Or], *masks: Mask) -> Mask:
    """Flatten, drop neutral elements and repetitions; keep the order in which terms were written."""
    neutral, absorbing = (sympy.true, sympy.false) if kind is And else (sympy.false, sympy.true)
    terms: list[Mask] = []
    for mask in masks:
        for term in mask.terms if isinstance(mask, kind) else (mask,):
            if term.predicate == absorbing:
                return term
            if term.predicate != neutral and term not in terms:
                terms.append(term)
    if not terms:
        return predicate(neutral)
    return terms[0] if len(terms) == 1 else kind(tuple(terms))


_TERMS: list[type[Mask]] = []


def register(term: type[Mask]) -> type[Mask]:
    """Add a named term (usable as a class decorator): masks whose predicate ``term.recognise`` knows become it.

    Terms are asked in the order of registration, the package's own first. Raises ValueError for one that is there.
    """
    if term in _TERMS:
        raise ValueError(f"mask term {term.__name__} is registered already")
    _TERMS.append(term)
    decode.cache_clear()
    return term


def unregister(term: type[Mask]) -> None:
    """Take a term out again. Raises ValueError for one that is not registered."""
    _TERMS.remove(term)
    decode.cache_clear()


def terms() -> tuple[type[Mask], ...]:
    """The named terms, in the order in which they are asked."""
    return tuple(_TERMS)


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
    for term in _TERMS:
        if (mask := term.recognise(expr)) is not None:
            return mask
    return Predicate(expr)


def _ordered(args: Any) -> list[Any]:
    # Causal before padding before the rest, independent of sympy's hash order.
    return sorted(args, key=lambda a: (bool(a.atoms(sympy.Function)), not a.has(KV), sympy.default_sort_key(a)))


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
