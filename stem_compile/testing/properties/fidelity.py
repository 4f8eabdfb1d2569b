"""Fidelity: how far the model is from itself at the user's budget, on the user's text.

No theorem says what a budget may cost, so this reports and does not judge, unless bounds are given. For a language
model: change of the negative log-likelihood of the text in nats a token, Kullback-Leibler divergence of the next-token
distribution from the dense model's, and how often both prefer the same token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from stem_compile.testing.case import Case
from stem_compile.testing.subject import Subject
from stem_compile.testing.violation import Inapplicable, Measure, Violation

NAME = "fidelity"
TITLE = "how far from dense at this budget (a report)"
ORDER = 12
EXAMPLES = 2


def cases(subject: Subject) -> Any:
    """Strategy of the examples to try. Raises Inapplicable where the property says nothing about the subject."""
    from hypothesis import strategies as st

    from stem_compile.testing.lengths import sparse
    from stem_compile.testing.strategies import cases as drawn

    if subject.text is not None:
        return st.just(Case(length=subject.text.shape[1]))
    return drawn(subject.source, sparse(subject), batches=(1,), pad=False, wide=False)


def check(subject: Subject, case: Case) -> Measure:
    """Whether the property holds on one example: how close it came to failing. Raises Violation where it does not."""
    given = subject.inputs(case) if subject.text is None else subject.text_inputs()
    leaves = [
        x
        for x in (given.kwargs.get("input_ids"), *given.args)
        if isinstance(x, torch.Tensor) and x.dtype == torch.long and x.dim() == 2
    ]
    ids = leaves[0] if leaves else None
    dense = subject.own(given)
    if ids is None or dense.dim() != 3 or dense.shape[1] != ids.shape[1] or dense.shape[2] <= int(ids.max()):
        raise Inapplicable("the output is no distribution over the next token")
    run = subject.run_of(case) if subject.text is None else subject.run(given)
    facts = distance(dense, run.output, ids)
    facts["density"] = sum(m.density for m in run.selections) / len(run.selections) if run.selections else 1.0
    for name, bound in subject.bounds.items():
        if name not in facts:
            raise Violation(f"no measure is called {name!r}; measures: {', '.join(facts)}")
        beyond = facts[name] < bound if name == "top-1" else facts[name] > bound
        if beyond:
            raise Violation(f"{name} is {facts[name]:.4g}, the bound {bound:g}")
    return Measure(facts=facts)


def note(subject: Subject) -> str:
    """What the figures are of."""
    return "on random tokens, which tell little: give a text" if subject.text is None else "on your text"


def distance(dense: torch.Tensor, sparse: torch.Tensor, ids: torch.Tensor) -> dict[str, float]:
    """dense, sparse: logits [B, N, vocabulary]. NLLs and KL in nats a token; top-1: part of the positions where both
    prefer the same token."""
    p, q = (F.log_softmax(x[:, :-1].float(), -1) for x in (dense, sparse))
    nll = [float(F.nll_loss(x.flatten(0, 1), ids[:, 1:].flatten())) for x in (p, q)]
    kl = float(F.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean())
    return {
        "nll dense": nll[0],
        "nll change": nll[1] - nll[0],
        "kl": kl,
        "top-1": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
    }
