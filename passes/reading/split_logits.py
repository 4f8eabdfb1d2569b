"""Split the logits of an attention into what hides keys and what changes scores.

Logits are read as one expression in ``SCORE``, the raw product q.k. However a model spells its mask (added, filled in,
chosen by ``where``, multiplied), a hidden key's logit ends up at a very negative constant: each choice (``Where``) of
the expression with such a branch is a condition of the mask. What is left is a scale and a ``Score``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy

from stem_compile.algebra import symbolic
from stem_compile.algebra.distance import by_distance
from stem_compile.algebra.scores import Score
from stem_compile.algebra.symbolic import KV, SCORE, Q, Where

DEEP = -8000.0
"""A constant at or below it hides a key: models write -10000, the dtype's minimum or -inf."""
FAINT = -20.0
"""A constant at or below it is meant to hide a key."""
LOWEST = -1e30
"""A constant at or below it hides a key in any row where another one is above."""
LARGE = 5000.0
"""Factor from which a term might outweigh such a constant."""
LARGEST = 1e38
"""Largest number left in a score: kernels multiply by log2(e) in fp32."""
SUNK = -(2.0**20)
"""Every logit of a row whose greatest bias is below ``LOWEST``: scores are lost in such a bias, so its keys weigh the
same, and a sink all the more. Kernels keep the digits of this one."""
GROWN = 1e29
"""What an exponential of positions may reach where a key is hidden: only ``LOWEST`` hides it for sure."""
FARTHEST = 2**20
"""Positions at which it is looked whether an exponential grows."""


RowMaximum = Callable[[Any], Any]
"""The greatest value of a loaded bias in the query's row, as another load; None where it is not known."""


def split_logits(expr: Any, row_maximum: RowMaximum = lambda load: None) -> tuple[Any, float, Score]:
    """(predicate: which keys are visible, scale: positive factor of q.k, the score) of logits in ``SCORE``.

    A scale is taken out where the logits grow by a constant with the product at 0; where they do not (a learned
    temperature), it is 1.
    """
    hides, expr = hidden_conditions(expr, row_maximum)
    visible = sympy.And(*(h.visible for h in hides))
    expr = symbolic.expand(expr) if not expr.atoms(sympy.tanh) else expr
    kinked = expr.atoms(Where, sympy.Max, sympy.Min, sympy.Abs)
    slope = sympy.diff(expr, SCORE).subs(SCORE, 0) if not kinked else sympy.Integer(0)
    scale = float(slope) if slope.is_number and slope.is_real and slope > 0 else 1.0
    score = by_distance(_settled(expr.subs(SCORE, SCORE / sympy.Rational(scale))))
    for sunk in (h.sunk for h in hides if h.sunk is not None):
        score = Where(sunk, sympy.Rational(SUNK), score)
    return in_floats(visible), scale, Score(in_floats(score, LARGEST))


@dataclass(frozen=True)
class Hide:
    """One reason to hide a key.

    visible: condition under which it does not hide. visible_logits, hidden_logits: replacements in the logits that
    leave what they are where the condition holds, and where it does not. load: the bias whose very negative entries
    hide by themselves; it stays in the logits, and nothing is replaced. sunk: condition of the rows in which the
    greatest of these entries is below ``LOWEST``.
    """

    visible: Any
    visible_logits: Mapping[Any, Any] = field(default_factory=dict)
    hidden_logits: Mapping[Any, Any] = field(default_factory=dict)
    load: Any = None
    sunk: Any = None


def hidden_conditions(
    expr: Any, row_maximum: RowMaximum = lambda load: None, level: float = DEEP
) -> tuple[list[Hide], Any]:
    """(what hides keys, the expression where nothing does). level: how far below a visible key a hidden one is."""
    hides: list[Hide] = []
    expr = _without_floors(expr)
    kept: set[Any] = set()
    while choices := [c for c in (*_masks(expr), *_choices(expr)) if c not in kept]:
        for choice in choices:
            if (multiplied := _hidden_by_factor(choice, expr, row_maximum)) is not None:
                hides.append(multiplied[0])
                expr = multiplied[1]
                kept |= {choice, expr}
                break
            hide = next((h for h in _ways(choice) if _hides(h, expr, level)), None)
            if hide is not None:
                hides.append(hide)
                expr = expr.xreplace(dict(hide.visible_logits))
                kept |= {choice} if hide.load is not None else set()
                break
        else:
            kept.update(choices)
    terms = (term.as_coeff_Mul() for term in sympy.Add.make_args(symbolic.expand(expr)))
    biases = [(f, b) for f, b in terms if f > 0 and symbolic.load_index(b) is not None and {Q, KV} <= b.free_symbols]
    # The greatest entry of a row is that of a visible key only where nothing else hides keys.
    alone = len(biases) == 1 and not hides
    hides += [_hidden_by_entries(bias, factor, row_maximum(bias) if alone else None) for factor, bias in biases]
    return hides, expr


def _hides(hide: Hide, expr: Any, level: float) -> bool:
    """Whether a key's logit, where the hide says it is hidden, is negligible beside what it is where it is not."""
    if hide.load is not None:
        return True
    hidden, visible = (expr.xreplace(dict(r)) for r in (hide.hidden_logits, hide.visible_logits))
    return is_deep(hidden, beside=visible, level=level)


def _hidden_by_factor(load: Any, expr: Any, row_maximum: RowMaximum) -> tuple[Hide, Any] | None:
    """A mask of ones and zeros for queries and keys, multiplied by a large number: its ones are visible, as they are
    (logits of ones lose no digits to the factor), and whatever else is not far below the greatest of its row."""
    if symbolic.load_index(load) is None or not {Q, KV} <= load.free_symbols:
        return None
    factor, greatest = symbolic.expand(expr).coeff(load).as_coeff_Add()[0], row_maximum(load)
    if greatest is None or not factor.is_number or factor < LARGE:
        return None
    one = sympy.Eq(load, 1)
    near = _near(load, factor, greatest)
    return replace(near, visible=sympy.Or(one, near.visible)), Where(one, expr.xreplace({load: sympy.Integer(1)}), expr)


def _hidden_by_entries(load: Any, factor: Any, row_maximum: Any) -> Hide:
    """A bias that was not understood may hold the mask: entries far below the greatest of their row hide. Where that
    one is not known, only those hide that no score brings back."""
    if row_maximum is not None:
        return _near(load, factor, row_maximum)
    return Hide(sympy.Gt(load, LOWEST / factor), load=load)


def _near(load: Any, factor: Any, greatest: Any) -> Hide:
    """Hide of the entries of a bias that are far below the greatest of their row."""
    return Hide(sympy.Gt(load - greatest, DEEP / factor), load=load, sunk=sympy.Le(greatest, LOWEST / factor))


def faintly_hidden(score: Any) -> tuple[Any, float] | None:
    """(condition of the keys that are not meant to be hidden, the level of those that are) where choices of the score
    lower a key too little to hide it: at -1000 it keeps a weight as soon as scores differ by as much. None where
    nothing is lowered so far."""
    hides = hidden_conditions(score, level=FAINT)[0]
    visible = [h for h in hides if h.load is None]
    if not visible:
        return None
    lowered = score.xreplace({k: v for h in visible for k, v in h.hidden_logits.items()})
    return sympy.And(*(h.visible for h in visible)), _highest(symbolic.expand(lowered))


def _ways(choice: Any) -> Iterator[Hide]:
    """Reasons to hide a key that a choice may be: one of its branches, or one of a choice within a branch."""
    if not isinstance(choice, Where):
        yield _hide(choice, True)
        return
    condition, *branches = choice.args
    for branch, visible in ((branches[1], condition), (branches[0], sympy.Not(condition))):
        # The value of hidden keys is a tensor's: whether it hides is decided where it is read.
        if symbolic.load_index(branch) is not None and not branch.free_symbols:
            yield Hide(sympy.Or(visible, sympy.Gt(branch, DEEP)), load=branch)
    yield from (_hide(condition, shows) for shows in (True, False))
    for place, taken in enumerate((condition, sympy.Not(condition))):
        for inner in _choices(branches[place]):
            for hidden, visible in ((1, 2), (2, 1)):
                reached = sympy.And(taken, inner.args[0] if hidden == 1 else sympy.Not(inner.args[0]))
                kept = [b.xreplace({inner: inner.args[visible]}) if n == place else b for n, b in enumerate(branches)]
                yield Hide(
                    sympy.Not(reached),
                    {choice: kept[0] if kept[0] == kept[1] else Where(condition, *kept)},
                    {choice: branches[place].xreplace({inner: inner.args[hidden]})},
                )


def _hide(condition: Any, shows: bool) -> Hide:
    """Hide of a choice's condition, which holds where keys are visible (``shows``) or hidden, or of a load that a mask
    multiplies: 1 keeps a key."""
    if symbolic.load_index(condition) is not None:
        return Hide(sympy.Ge(condition, 1), {condition: sympy.Integer(1)}, {condition: sympy.Integer(0)})
    yes, no = ({condition: truth, sympy.Not(condition): sympy.Not(truth)} for truth in (sympy.true, sympy.false))
    return Hide(condition, yes, no) if shows else Hide(sympy.Not(condition), no, yes)


def is_deep(expr: Any, beside: Any = 0, level: float = DEEP) -> bool:
    """Whether a logit is that of a hidden key whatever the product is, since a softmax only sees differences: far below
    ``beside``, the logit of a visible one."""
    top = _highest(symbolic.expand(beside))
    return _highest(symbolic.expand(expr)) <= level + (min(top, 0.0) if top != float("inf") else 0.0)


def _highest(expr: Any) -> float:
    """A value the expression does not exceed, products and loads of ordinary size counted as nothing beside
    ``DEEP``."""
    total = 0.0
    for term in sympy.Add.make_args(expr):
        factor, rest = term.as_coeff_Mul()
        if rest == 1:
            total += float(factor)
        elif choices := _choices(rest):
            total += max(
                _highest(symbolic.expand(term.xreplace({choices[0]: branch}))) for branch in choices[0].args[1:]
            )
        elif factor <= DEEP and _divides(rest):
            total += float(factor)
        elif abs(factor) >= LARGE:
            # Only a mask of zeros and ones has such a factor.
            total += max(float(factor), 0.0) if symbolic.load_index(rest) is not None else float("inf")
        elif _grows(rest):
            total += GROWN
    return total


def _grows(rest: Any) -> bool:
    """Whether a term holds an exponential that grows with positions somewhere: exp((kv - q) / 20) is nothing for keys
    in the past and outweighs -10000 for those to come."""
    corners = [{Q: q, KV: k} for q in (0, FARTHEST) for k in (0, FARTHEST)]
    powers = [e.exp for e in rest.atoms(sympy.exp, sympy.Pow) if e.exp.free_symbols & {Q, KV}]
    return any(not (high := p.subs(at)).is_number or high > 1 for p in powers for at in corners)


def _divides(rest: Any) -> bool:
    """Whether a product is of reciprocals of loads: a scale, positive in any model that works."""
    return all(
        isinstance(f, sympy.Pow) and f.exp.is_negative and symbolic.load_index(f.base) is not None
        for f in sympy.Mul.make_args(rest)
    )


def _choices(expr: Any) -> list[Any]:
    """Choices of the expression, outermost first."""
    return [e for e in sympy.preorder_traversal(expr) if isinstance(e, Where)]


def _masks(expr: Any) -> list[Any]:
    """Loads with a factor so large that 0 and 1 decide: a padding mask that was multiplied instead of compared."""
    loads = set()
    for term in sympy.Add.make_args(symbolic.expand(expr)):
        factor, rest = term.as_coeff_Mul()
        if abs(factor) >= LARGE and symbolic.load_index(rest) is not None:
            loads.add(rest)
    return sorted(loads, key=lambda load: ({Q, KV} <= load.free_symbols, str(load)))


def _without_floors(expr: Any) -> Any:
    """``max(x, very negative)`` is x: such clamps only keep sums of masks finite."""
    floors = {
        e: sympy.Max(*kept)
        for e in expr.atoms(sympy.Max)
        if len(kept := [a for a in e.args if not (a.is_number and a <= DEEP)]) < len(e.args) and kept
    }
    return expr.xreplace(floors) if floors else expr


def in_floats(expr: Any, largest: float | None = None) -> Any:
    """Fractions, and whole numbers that no integer type holds, as floats: what kernels compute with, none of them
    beyond ``largest``."""
    wide = [n for n in expr.atoms(sympy.Rational) if not n.is_Integer or abs(n) >= 1 << 31]
    numbers = {n: sympy.Float(float(n if largest is None else min(max(n, -largest), largest))) for n in wide}
    powers = {e: e for e in expr.atoms(sympy.Pow)}
    return expr.xreplace({n: f for n, f in numbers.items() if not any(n == p.exp for p in powers)})


def _settled(expr: Any) -> Any:
    """The score with factors that are 1 up to rounding made exactly 1, so that a plain score is plain."""
    if not expr.has(SCORE):
        return expr
    terms = []
    for term in sympy.Add.make_args(expr):
        factor, rest = term.as_coeff_Mul()
        terms.append(
            rest
            if rest.has(SCORE) and factor != 1 and abs(float(factor) - 1) < 1e-9
            else sympy.Integer(0)
            if factor == 0
            else term
        )
    return sympy.Add(*terms)
