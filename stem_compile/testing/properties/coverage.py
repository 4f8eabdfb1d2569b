"""Coverage: the attentions that were rewritten are those expected, and nothing fell back silently.

A model that stays dense is right and slow, so no other property would notice. Expected are all attentions that were
found, or as many as the user states; a refusal that options or lengths ask for (``dense_layers``, ``fuel``, decoding,
``min_length``) is no fault. At run time, every rewritten attention must select.
"""

from __future__ import annotations

from typing import Any

from stem_compile.backend import BENIGN
from stem_compile.passes.graph.sites import AttentionSite, Rejected
from stem_compile.passes.graph.values import module_path
from stem_compile.reasons import Reason
from stem_compile.testing.case import Case
from stem_compile.testing.subject import Subject
from stem_compile.testing.violation import Measure, Violation

NAME = "coverage"
TITLE = "the expected attentions are rewritten"
ORDER = 4
EXAMPLES = 4


def cases(subject: Subject) -> Any:
    """Strategy of the examples to try. Raises Inapplicable where the property says nothing about the subject."""
    from stem_compile.testing.lengths import sparse
    from stem_compile.testing.strategies import cases as drawn

    return drawn(subject.source, sparse(subject), pad=not subject.large, wide=False)


def check(subject: Subject, case: Case) -> Measure:
    """Whether the property holds on one example: how close it came to failing. Raises Violation where it does not."""
    run = subject.run_of(case)
    sites = [hit for hit in run.attentions if isinstance(hit, AttentionSite)]
    asked = (
        (*BENIGN, Reason.GRADIENT)
        if subject.options["min_length"]
        else tuple(r for r in BENIGN if r is not Reason.SHORT)
    )
    refused = [hit for hit in run.attentions if isinstance(hit, Rejected) and hit.reason not in asked]
    expected = subject.expected
    if expected is None and not run.attentions:
        raise Violation(
            "no attention was found: the model has none in its compiled graphs, or its spelling is not recognised;"
            " expected=0 if that is meant"
        )
    if (expected is None and refused) or (expected is not None and len(sites) != expected):
        wanted = "all" if expected is None else expected
        reasons = "".join(f"\n  {module_path(hit.node)}: {hit.words}" for hit in refused[:8])
        meant = f"\n  expected={len(sites)} if that is meant" if expected is None else ""
        raise Violation(
            f"{len(sites)} of {len(run.attentions)} attentions were rewritten, expected {wanted}{reasons}{meant}"
        )
    if len(run.selections) != len(sites):
        raise Violation(
            f"{len(sites)} attentions were rewritten and {len(run.selections)} selected blocks when they ran"
        )
    return Measure(facts={"rewritten": len(sites), "found": len(run.attentions)})
