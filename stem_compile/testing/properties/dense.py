"""Dense equivalence: with ``budget=1.0`` the compiled model computes what the model itself computes.

At full budget every visible block is computed, so nothing is approximated: recovered masks, scales, head maps, cached
offsets and padding must be right, for every length and batch. Off from the model in fp64 by no more than
``tolerances.MODEL`` allows, at every position.
"""

from __future__ import annotations

from typing import Any

from stem_compile.testing import numerics
from stem_compile.testing.case import Case
from stem_compile.testing.subject import Subject
from stem_compile.testing.violation import Measure, require

NAME = "dense-equivalence"
TITLE = "budget 1.0 equals the model's own attention"
ORDER = 1
EXAMPLES = 16
BATCHES = (1, 2, 5)
"""One row, two, and more than a kernel's fixed tables or unrolled loops may have been written for."""


def cases(subject: Subject) -> Any:
    """Strategy of the examples to try. Raises Inapplicable where the property says nothing about the subject."""
    from stem_compile.testing.lengths import dense
    from stem_compile.testing.strategies import cases as drawn

    return drawn(subject.source, dense(subject), batches=BATCHES, wide=subject.wide)


def check(subject: Subject, case: Case) -> Measure:
    """Whether the property holds on one example: how close it came to failing. Raises Violation where it does not."""
    run = subject.run(case, budget=1.0)
    gap = numerics.gap(run.output, subject.golden(case), subject.tolerance(case), subject.inputs(case).valid)
    return require(gap, "the output at budget 1.0 is not the model's")
