"""Block causality: tokens after the end of a query block never change its output.

The last query block that reads a token also selects with it, so selection must be causal too: a score that looks at the
whole sequence (as
``metric="released"`` does, which is therefore left out) makes a prompt's beginning depend on its end, and cached
prefixes wrong. Two prompts of one length that agree up to a block's end must agree in their outputs up to there.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from stem_compile.testing import numerics
from stem_compile.testing.case import Case
from stem_compile.testing.invariance import own_holds
from stem_compile.testing.subject import Subject
from stem_compile.testing.violation import Inapplicable, Measure, require

NAME = "block-causality"
TITLE = "later tokens never change a finished query block"
ORDER = 5
EXAMPLES = 8


def cases(subject: Subject) -> Any:
    """Strategy of the examples to try. Raises Inapplicable where the property says nothing about the subject."""
    from hypothesis import strategies as st

    from stem_compile.testing.lengths import bounds, sparse
    from stem_compile.testing.strategies import cases as drawn

    if subject.options.get("metric") == "released":
        raise Inapplicable('metric="released" normalises over the whole sequence by definition')
    if "length" not in subject.source.can:
        raise Inapplicable("a drawn input cannot be changed from a position on")
    if subject.expected == 0:
        raise Inapplicable("no attention is expected to be rewritten")
    cuts = st.integers(1, (bounds(subject)[0] - 1) // subject.block).map(lambda n: n * subject.block)
    return drawn(
        subject.source, sparse(subject), batches=(1,) if subject.large else (2,), pad=False, wide=False, cuts=cuts
    )


def check(subject: Subject, case: Case) -> Measure:
    """Whether the property holds on one example: how close it came to failing. Raises Violation where it does not."""
    whole = dataclasses.replace(case, cut=0)
    here = subject.inputs(whole)
    other = subject.inputs(Case(case.length, case.batch, case.seed + 1000, style=case.style))
    changed = here.spliced(other, case.cut, case.length)
    allowed = subject.tolerance(whole)
    own_holds(subject, here, changed, lambda x: x[:, : case.cut], lambda x: x[:, : case.cut], allowed)
    first, second = subject.run_of(whole).output, subject.run(changed).output
    gap = numerics.gap(second[:, : case.cut], first[:, : case.cut], allowed)
    return require(gap, f"tokens from {case.cut} on changed the output before them")
