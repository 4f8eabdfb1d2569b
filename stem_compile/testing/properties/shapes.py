"""Shape robustness: every length works, and few of them compile anew.

Lengths of 1, of a block and its neighbours, a prime, and one longer than any seen, in one compiled model as a user
compiles it. Kernels that assume whole
blocks fail here, and so does a backend that fixes what it saw first: Dynamo makes a length dynamic when it changes,
treats 1 apart, and that is all that may be compiled.
"""

from __future__ import annotations

from typing import Any

import torch

from stem_compile import backend
from stem_compile.testing import numerics
from stem_compile.testing.case import Case
from stem_compile.testing.subject import Subject, changed_options
from stem_compile.testing.traced import primary
from stem_compile.testing.violation import Inapplicable, Measure, Violation, named

NAME = "shape-robustness"
TITLE = "any length works, few compile anew"
ORDER = 13
"""Last, since it makes Dynamo forget the traces that the others share."""
EXAMPLES = 1
MOST = 4
"""Graphs for all lengths: the first as it came, one with a dynamic length, one for a single token, and one for a
threshold of lengths."""


def cases(subject: Subject) -> Any:
    """Strategy of the examples to try. Raises Inapplicable where the property says nothing about the subject."""
    from hypothesis import strategies as st

    from stem_compile.testing.strategies import SEEDS

    if "length" not in subject.source.can:
        raise Inapplicable("a drawn input has the length it has")
    batch = 2 if "batch" in subject.source.can and not subject.large else 1
    return st.builds(lambda seed: Case(subject.block, batch, seed), SEEDS)


def lengths(block: int, large: bool = False) -> list[int]:
    """In the order in which they are tried; fewer for large models."""
    if large:
        return [block, 2 * block + 1, 1, 131]
    return [block, block + 1, block - 1, 1, 2 * block + 3, 131, 3 * block, 2 * block + 1, 4 * block + 5]


def check(subject: Subject, case: Case) -> Measure:
    """Whether the property holds on one example: how close it came to failing. Raises Violation where it does not."""
    tried = [
        n
        for n in lengths(subject.block, subject.large)
        if n <= subject.source.longest and _runs(subject, Case(n, case.batch, case.seed))
    ]
    if not tried:
        subject.eager(case)
    compiled: list[int] = []
    options, worst, length = changed_options(subject.options, {"budget": 1.0}), 0.0, 0
    # A cache entry of another compiled form of the model is none of this one.
    torch._dynamo.reset()
    model = torch.compile(subject.model, backend=lambda module, inputs: backend.stem(module, inputs, options=options))
    with backend.listen(lambda _: compiled.append(length)), torch.no_grad():
        for length in tried:
            given = subject.inputs(Case(length, case.batch, case.seed))
            here = Case(length, case.batch, case.seed)
            try:
                output = primary(model(*given.args, **given.kwargs))
            except Exception as error:
                raise Violation(
                    f"length {length} raises {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                ) from error
            gap = numerics.gap(output, subject.golden(here), subject.tolerance(here), given.valid)
            if not gap.ok:
                raise Violation(f"length {length}: {gap.words} at {named(gap.where)}", gap)
            worst = max(worst, gap.ratio)
    torch._dynamo.reset()
    graphs = len(set(compiled))
    if graphs > MOST:
        raise Violation(
            f"{graphs} of {len(tried)} lengths were compiled anew: {', '.join(map(str, sorted(set(compiled))))}; at"
            f" most {MOST} may be"
        )
    return Measure(worst, {"lengths": len(tried), "compiled": graphs})


def _runs(subject: Subject, case: Case) -> bool:
    """Whether the model itself takes this length."""
    try:
        subject.eager(case)
    except Exception:
        return False
    return True
