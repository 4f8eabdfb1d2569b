"""Lengths worth trying: those where blocks, budgets and options begin to matter, and no longer."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from stem_compile.testing.subject import Subject
from stem_compile.testing.violation import Inapplicable


def dense(subject: Subject) -> Any:
    """From one token to a few query blocks, ragged ends included."""
    return st.integers(1, min(4 * subject.block + 3, subject.source.longest))


def bounds(subject: Subject) -> tuple[int, int]:
    """Shortest length with rows that must leave blocks out, and one a few query blocks longer. Raises Inapplicable."""
    spec = subject.config.selection
    low = max((spec.sinks + spec.locals) * subject.key_block + 2 * subject.block, subject.config.shortest)
    high = min(low + 4 * subject.block, subject.source.longest)
    if subject.source.strategy is None and high < low:
        raise Inapplicable(f"blocks are left out from {low} tokens on, and the model has {high} positions")
    return low, high


def sparse(subject: Subject) -> Any:
    """Lengths at which rows leave blocks out, ragged ends included."""
    return st.integers(*bounds(subject))


def whole(subject: Subject) -> Any:
    """The same in whole query blocks."""
    low, high = bounds(subject)
    return st.integers(-(-low // subject.block), max(-(-low // subject.block), high // subject.block)).map(lambda n: n * subject.block)
