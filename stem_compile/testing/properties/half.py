"""Half precision: the model in bf16 and in fp16 is what it is in fp32.

A model is checked in fp32 and deployed in bf16. Its kernels are then others: products of half-precision operands,
biases and masks that are rounded on the way, accumulators that must not be. So a model in fp32 is also tried in both
halves: at budget 1.0 it is the model's own, off from fp64 by no more than a small multiple of what the model in that
dtype is off itself, and at the budget it is that of the selected blocks. Where that multiple is more than the output
itself, rounding decides what the model computes, and no two runs need agree.
"""

from __future__ import annotations

from typing import Any

import torch

from stem_compile.testing import numerics
from stem_compile.testing.case import Case
from stem_compile.testing.properties import dense, kernel
from stem_compile.testing.subject import LOWER, Subject
from stem_compile.testing.violation import Inapplicable, Measure, Violation

NAME = "half-precision"
TITLE = "in bf16 and fp16 too"
ORDER = 3
EXAMPLES = 4


def cases(subject: Subject) -> Any:
    """Strategy of the examples to try. Raises Inapplicable where the property says nothing about the subject."""
    from hypothesis import strategies as st

    from stem_compile.testing.lengths import sparse

    if subject.dtype != torch.float32:
        raise Inapplicable(f"the model is in {str(subject.dtype).removeprefix('torch.')}, and was checked there")
    if subject.large:
        raise Inapplicable("a large model is checked in the dtype that it has: pass it in bf16")
    if subject.source.strategy is not None:
        return st.builds(Case, given=subject.source.strategy)
    return st.builds(
        lambda n, seed: Case(n, 2 if "batch" in subject.source.can else 1, seed), sparse(subject), st.integers(0, 99)
    )


def check(subject: Subject, case: Case) -> Measure:
    """Whether the property holds on one example: how close it came to failing. Raises Violation where it does not."""
    twins: dict[str, Subject] = {}
    for dtype in LOWER:
        twin, name = subject.lowered(dtype), str(dtype).removeprefix("torch.")
        try:
            twin.eager(case)
        except Exception:
            continue
        if twin.tolerance(case) > numerics.size(twin.golden(case), twin.inputs(case).valid):
            # Choices that rounding turns, such as which expert a token goes to, make any two runs differ: in the finer
            # dtype too, only at fewer tokens.
            raise Inapplicable(
                f"the model itself is unsteady in {name}: its own rounding is of the order of its output"
            )
        twins[name] = twin
    measures, reason = [], "the model itself does not run in half precision"
    for name, twin in twins.items():
        for part in (dense, kernel):
            try:
                measures.append(part.check(twin, case))
            except Inapplicable as error:
                reason = str(error)
            except Violation as violation:
                raise Violation(f"in {name}: {violation.message}", violation.gap) from None
    if not measures:
        raise Inapplicable(reason)
    return Measure(max(m.worst for m in measures))
