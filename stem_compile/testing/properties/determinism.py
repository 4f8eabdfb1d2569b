"""Determinism: the same inputs give the same bits and the same blocks.

Runs that differ cannot be debugged, and a difference that comes from uninitialised memory is a wrong answer waiting.
Where the model itself is deterministic, two compiled runs must be equal bit by bit; on a CPU the second runs with
uninitialised memory filled with NaN.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from stem_compile.testing import numerics
from stem_compile.testing.agreement import dense_of
from stem_compile.testing.case import Case
from stem_compile.testing.subject import Subject
from stem_compile.testing.violation import Inapplicable, Measure, Violation, named

NAME = "determinism"
TITLE = "equal inputs give equal bits and blocks"
ORDER = 10
EXAMPLES = 5


def cases(subject: Subject) -> Any:
    """Strategy of the examples to try. Raises Inapplicable where the property says nothing about the subject."""
    from stem_compile.testing.lengths import sparse
    from stem_compile.testing.strategies import cases as drawn

    return drawn(
        subject.source, sparse(subject), batches=(1,) if subject.large else (2,), pad=not subject.large, wide=False
    )


def check(subject: Subject, case: Case) -> Measure:
    """Whether the property holds on one example: how close it came to failing. Raises Violation where it does not."""
    inputs = subject.inputs(case)
    with torch.no_grad():
        own = [
            numerics.errors(subject.run_eager(inputs), subject.eager(case)).max()
            for _ in range(1 if subject.large else 2)
        ]
    if float(max(own)) > 0:
        raise Inapplicable("the model itself gives different bits for equal inputs")
    first = subject.run_of(case)
    # Around the graph, not around Dynamo, which would trace anew under the switch.
    with subject.within(lambda: _poisoned(subject.device)):
        second = subject.run(case)
    for index, (a, b) in enumerate(zip(dense_of(first.selections), dense_of(second.selections))):
        if not torch.equal(a, b):
            place = (a != b).any(-1).nonzero()[0].tolist()
            raise Violation(
                f"attention {index} selects other blocks in a second run, at (batch, head, query block) ="
                f" {tuple(place)}"
            )
    gap = numerics.gap(second.output, first.output, float(torch.finfo(torch.float64).tiny), inputs.valid)
    if not gap.ok:
        raise Violation(f"a second run differs by {gap.error:.2e} at {named(gap.where)}", gap)
    return Measure()


@contextlib.contextmanager
def _poisoned(device: torch.device) -> Iterator[None]:
    """Uninitialised memory holds NaN. Not on a GPU, where the switch would also choose other algorithms."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
