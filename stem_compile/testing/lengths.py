"""Lengths worth trying: those where blocks, budgets and options begin to matter, and no longer."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from stem_compile.algebra import symbolic
from stem_compile.algebra.symbolic import BLOCKS, ROW
from stem_compile.selection import policies
from stem_compile.testing.subject import Subject
from stem_compile.testing.violation import Inapplicable


def dense(subject: Subject) -> Any:
    """From one token to a few query blocks, ragged ends included; block edges often, those of twice the block too, as
    kernels have tiles of their own. One token is a trace of its own, left to
    shape-robustness for large models."""
    longest = min(4 * subject.block + 3, subject.source.longest)
    if subject.large:
        return st.integers(min(2 * subject.block + 1, longest), longest)
    edges = [
        n for n in (2 * subject.block + 1, 4 * subject.block + 1, subject.block, subject.block - 1) if n <= longest
    ]
    return st.one_of(st.integers(1, longest), st.sampled_from(edges or [longest]))


def bounds(subject: Subject) -> tuple[int, int]:
    """Shortest length at which rows choose among blocks (beyond sinks and local ones), and one a few query blocks
    longer. Raises Inapplicable.

    A model with too few positions gets the lengths at which rows leave blocks out at all.
    """
    spec, longest = subject.config.selection, subject.source.longest
    forced = spec.sinks + spec.locals
    leaves_out = max(forced * subject.key_block + 2 * subject.block, subject.config.shortest)
    if subject.source.strategy is None and longest < leaves_out:
        raise Inapplicable(f"blocks are left out from {leaves_out} tokens on, and the model has {longest} positions")
    low = max(leaves_out, _choosing(subject, forced) * subject.key_block)
    low = low if low <= longest else leaves_out
    return low, min(low + 3 * subject.block, longest)


def _choosing(subject: Subject, forced: int) -> int:
    """Blocks from which on the last rows' budget is two more than what is forced, or one for large models."""
    spec = subject.config.selection
    policy = policies.get(spec.policy)
    if not policy.SCORED or spec.budget == 1:
        return 0
    budget = policy.budget(spec)
    # The row before the last: the last is whole.
    least = forced + (1 if subject.large else 2)
    return next((n for n in range(2, 2048) if least <= symbolic.evaluate(budget, {ROW: n - 2, BLOCKS: n}) < n - 2), 0)


def sparse(subject: Subject) -> Any:
    """Lengths at which rows leave blocks out, ragged ends included. Two of them for large models, so that properties
    share their runs."""
    low, high = bounds(subject)
    return (
        st.sampled_from(sorted({low, min(low + subject.block // 2 + 5, high)}))
        if subject.large
        else st.integers(low, high)
    )
