"""Split the logits of an attention into what hides keys and what changes scores.

Logits are read as one expression in ``SCORE``, the raw product q.k. However a model spells its mask (added, filled in,
chosen by ``where``, multiplied), a hidden key's logit ends up at a very negative constant: each choice (``Where``) of
the expression with such a branch is a condition of the mask. What is left is a scale and a ``Score``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy

from stem_compile.algebra import symbolic
from stem_compile.algebra.scores import Score
from stem_compile.algebra.symbolic import KV, SCORE, Q, Where

DEEP = -8000.0
"""A constant at or below it hides a key: models write -10000, the dtype's minimum or -inf."""
LARGE = 5000.0
"""Factor from which a term might outweigh such a constant."""
LARGEST = 1e38
"""Largest number left in a score: kernels multiply by log2(e) in fp32."""


def split_logits(expr: Any) -> tuple[Any, float, Score]:
    """(predicate: which keys are visible, scale: positive factor of q.k, the score) of logits in ``SCORE``.

    A scale is taken out where the logits grow by a constant with the product at 0; where they do not (a learned
    temperature), it is 1.
    """
    hides, expr = hidden_conditions(expr)
    visible = sympy.And(*(h.visible for h in hides))
    expr = symbolic.expand(expr) if not expr.atoms(sympy.tanh) else expr
    slope = sympy.diff(expr, SCORE).subs(SCORE, 0) if not expr.atoms(Where) else sympy.Integer(0)
    scale = float(slope) if slope.is_number and slope.is_real and slope > 0 else 1.0
    return (
        in_floats(visible),
        scale,
        Score(in_floats(_settled(expr.subs(SCORE, SCORE / sympy.Rational(scale))), LARGEST)),
    )


@dataclass(frozen=True)
class Hide:
    """One reason to hide a key. visible: where it does not. shown, hidden: what the logits' choices are replaced by
    where it does not and where it does.

    A load that hides by its own very negative entries replaces nothing: then both are None.
    """

    visible: Any
    shown: dict[Any, Any] | None = None
    hidden: dict[Any, Any] | None = None


def hidden_conditions(expr: Any) -> tuple[list[Hide], Any]:
    """(what hides keys, the expression where nothing does)."""
    hides: list[Hide] = []
    expr = _without_floors(expr)
    kept: set[Any] = set()
    while choices := [c for c in (*_masks(expr), *_choices(expr)) if c not in kept]:
        for choice in choices:
            found = next((h for h in _ways(choice) if is_deep(expr.xreplace(h.hidden or {}))), None)
            if found is not None:
                hides.append(found)
                expr = expr.xreplace(found.shown or {})
                break
        else:
            kept.update(choices)
    for term in sympy.Add.make_args(symbolic.expand(expr)):
        # A bias that was not understood may hold the mask: its very negative entries hide.
        factor, rest = term.as_coeff_Mul()
        if factor > 0 and symbolic.load_index(rest) is not None and {Q, KV} <= rest.free_symbols:
            hides.append(Hide(sympy.Gt(rest, DEEP / factor)))
    return hides, expr


def _ways(choice: Any) -> Iterator[Hide]:
    """Reasons to hide a key that a choice may be: one of its branches, or one of a choice within a branch."""
    if not isinstance(choice, Where):
        yield _hide(choice, True)
        return
    condition, *branches = choice.args
    yield from (_hide(condition, shows) for shows in (True, False))
    for place, taken in enumerate((condition, sympy.Not(condition))):
        for inner in _choices(branches[place]):
            for hidden, shown in ((1, 2), (2, 1)):
                reached = sympy.And(taken, inner.args[0] if hidden == 1 else sympy.Not(inner.args[0]))
                kept = [b.xreplace({inner: inner.args[shown]}) if n == place else b for n, b in enumerate(branches)]
                yield Hide(
                    sympy.Not(reached),
                    {choice: Where(condition, *kept)},
                    {choice: branches[place].xreplace({inner: inner.args[hidden]})},
                )


def _hide(condition: Any, shows: bool) -> Hide:
    """Hide of a choice's condition, which holds where keys are visible (``shows``) or hidden, or of a load that a mask
    multiplies: 1 keeps a key."""
    if symbolic.load_index(condition) is not None:
        return Hide(sympy.Ge(condition, 1), {condition: sympy.Integer(1)}, {condition: sympy.Integer(0)})
    yes, no = ({condition: truth, sympy.Not(condition): sympy.Not(truth)} for truth in (sympy.true, sympy.false))
    return Hide(condition, yes, no) if shows else Hide(sympy.Not(condition), no, yes)


def is_deep(expr: Any) -> bool:
    """Whether the logit is that of a hidden key whatever the product is."""
    return _highest(symbolic.expand(expr)) <= DEEP


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
    return total


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
    found = set()
    for term in sympy.Add.make_args(symbolic.expand(expr)):
        factor, rest = term.as_coeff_Mul()
        if abs(factor) >= LARGE and symbolic.load_index(rest) is not None:
            found.add(rest)
    return sorted(found, key=str)


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
