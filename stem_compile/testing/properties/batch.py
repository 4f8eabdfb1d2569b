"""Batch invariance: rows of a batch do not influence each other.

A user's answer must not depend on who else is in the batch: a shared block list, the first row's lengths used for all,
or a score normalised over the batch would make it so. Every row must equal the same row sent alone, its padding
included, and select the same blocks (up to ties).
"""

from __future__ import annotations

from typing import Any

from stem_compile.testing import numerics
from stem_compile.testing.agreement import dense_of, forced
from stem_compile.testing.case import Case
from stem_compile.testing.invariance import own_holds
from stem_compile.testing.subject import Subject
from stem_compile.testing.violation import Inapplicable, Measure, require

NAME = "batch-invariance"
TITLE = "rows do not influence each other"
ORDER = 8
EXAMPLES = 6


def cases(subject: Subject) -> Any:
    """Strategy of the examples to try. Raises Inapplicable where the property says nothing about the subject."""
    from hypothesis import strategies as st

    from stem_compile.testing.lengths import sparse
    from stem_compile.testing.strategies import cases as drawn
    from stem_compile.testing.strategies import seeds

    if "batch" not in subject.source.can:
        raise Inapplicable("a drawn input has the batch size it has")
    if subject.expected == 0:
        raise Inapplicable("no attention is expected to be rewritten")
    if subject.large and "padding" in subject.source.can:
        # The graphs of padding invariance serve: a batch with a padded neighbour, and a row without padding alone.
        return st.builds(
            lambda n, seed: Case(n + subject.block, 2, seed, subject.block), sparse(subject), seeds(subject.source)
        )
    return drawn(subject.source, sparse(subject), batches=(2, 3, 6), pad=not subject.large, wide=False)


def check(subject: Subject, case: Case) -> Measure:
    """Whether the property holds on one example: how close it came to failing. Raises Violation where it does not."""
    inputs = subject.inputs(case)
    run = subject.run_of(case)
    dense, allowed, worst = dense_of(run.selections), subject.tolerance(case), 0.0
    for index in {0} if subject.large else {0, case.batch - 1}:
        row = inputs.row(index, case.batch)
        if subject.large:
            row = row.unpadded()
        valid = row.valid

        own_holds(
            subject,
            inputs,
            row,
            lambda x, i=index, v=valid: _kept(x[i : i + 1], v),  # type: ignore[misc]
            lambda x, v=valid: _kept(x, v),  # type: ignore[misc]
            allowed,
        )
        lone = subject.run(row, forced([d[index : index + 1] for d in dense], f"row {index} alone"))
        gap = numerics.gap(run.output[index : index + 1], lone.output, allowed, valid)
        worst = max(worst, require(gap, f"row {index} of {case.batch} differs from itself alone").worst)
    return Measure(worst)


def _kept(x: Any, valid: Any) -> Any:
    return x if valid is None or valid.shape != x.shape[:2] else x[valid]
