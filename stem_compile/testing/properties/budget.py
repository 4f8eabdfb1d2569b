"""Budget: what is computed is what was promised, and computing more brings the output closer.

A row of rank i (visible blocks before its last) computes k(i) blocks: all up to k_start, then falling linearly to mu *
k_start (Eq. 3 of arXiv 2603.06274), where k_start makes the computed part of the causal triangle ``budget``. Allowed is
one block of rounding; sinks and local blocks are always kept, and the row with the prompt's end is whole. Every list
must be sorted, in range and without blocks that no query sees. Over all examples together, the error must fall as the
budget grows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from stem_compile.selection import Observed
from stem_compile.testing import numerics
from stem_compile.testing.case import Case
from stem_compile.testing.subject import Subject
from stem_compile.testing.violation import Inapplicable, Measure, Violation

NAME = "budget"
TITLE = "density is what was promised; error falls as it grows"
ORDER = 11
EXAMPLES = 8


def cases(subject: Subject) -> Any:
    """Strategy of the examples to try. Raises Inapplicable where the property says nothing about the subject."""
    from stem_compile.testing.lengths import sparse
    from stem_compile.testing.strategies import cases as drawn

    return drawn(subject.source, sparse(subject), pad_step=subject.block, wide=False)


def check(subject: Subject, case: Case) -> Measure:
    """Whether the property holds on one example: how close it came to failing. Raises Violation where it does not."""
    run = subject.run_of(case)
    if not run.selections:
        raise Inapplicable("no attention was rewritten")
    golden, valid = subject.golden(case), subject.inputs(case).valid
    numerics.tolerance(golden, golden, subject.dtype, valid)  # NaN has no scores to rank blocks by
    for index, observed in enumerate(run.selections):
        _well_formed(index, observed)
    budget = subject.options.get("budget")
    facts: dict[str, Any] = {"density": sum(m.density for m in run.selections) / len(run.selections)}
    if isinstance(budget, int | float) and budget < 1:
        for part in (budget / 2, budget, (1 + budget) / 2):
            output = run.output if part == budget else subject.run(case, budget=part).output
            difference = numerics.errors(output, golden)
            kept = difference[valid] if valid is not None and valid.shape == difference.shape else difference
            facts[f"error at {part:.3g}"] = float(kept.square().mean().sqrt())
    return Measure(facts=facts)


def finish(subject: Subject, measures: Sequence[Measure]) -> None:
    """The mean error over all examples falls from half the budget over the budget to half way to dense."""
    names = [n for n in (measures[0].facts if measures else ()) if n.startswith("error at")]
    means = {n: sum(m.facts[n] for m in measures) / len(measures) for n in names}
    for less, more in itertools.pairwise(names):
        if means[more] > means[less]:
            raise Violation(
                f"the mean {more} ({means[more]:.2e}) is larger than the mean {less} ({means[less]:.2e}) over"
                f" {len(measures)} examples"
            )


def _well_formed(index: int, observed: Observed) -> None:
    candidates, spec = observed.candidates, observed.attention.spec
    try:
        observed.selection.check(candidates)
    except ValueError as error:
        raise Violation(f"attention {index}: {error}") from None
    dense = observed.selection.dense(candidates)
    visible = candidates.expand(dense.shape)
    rank, total = visible.cumsum(-1), visible.sum(-1)
    kept = visible & ((rank <= spec.sinks) | (rank > total.unsqueeze(-1) - spec.locals))
    _none(index, (kept & ~dense).any(-1), "leaves out a sink or local block")
    if spec.policy != "stem" or spec.budget is None:
        return
    count, whole = dense.sum(-1), total == total[..., -1:]
    promised = _promise(total, spec.budget, spec.mu)
    most = torch.maximum(promised + 1, torch.full_like(promised, spec.sinks + spec.locals))
    least = (promised - 1).clamp(max=total)
    # Heads that share a budget keep it together.
    together = spec.sharing_heads(dense.shape[1], observed.attention.k.shape[1])
    count, most, least = (x.unflatten(1, (-1, together)).sum(2) for x in (count, most, least))
    whole = whole.unflatten(1, (-1, together)).any(2)
    _none(index, (count > most) & (count > 0) & ~whole, "computes more blocks than its budget")
    if spec.coverage is None:
        _none(index, count < least, "computes fewer blocks than its budget")


def _promise(total: torch.Tensor, budget: float, mu: float) -> torch.Tensor:
    """k(i) in blocks, as real numbers, for rows that see ``total`` blocks."""
    blocks = total[..., -1:].double().clamp(min=1)
    # Area under min(i, k_start) and the falling line, as parts of the triangle: x^2 / 2 + (1 + mu) / 2 * (x - x^2) =
    # budget / 2.
    share = budget if mu == 0 else (1 + mu - math.sqrt((1 + mu) ** 2 - 4 * mu * budget)) / (2 * mu)
    start, rank = share * blocks, (total - 1).clamp(min=0).double()
    falling = start - (1 - mu) * start * (rank - start) / (blocks - start).clamp(min=1e-9)
    return torch.where(rank <= start, rank + 1, falling).clamp(min=0)


def _none(index: int, rows: torch.Tensor, what: str) -> None:
    if bool(rows.any()):
        raise Violation(f"attention {index} {what} at (batch, head, query block) = {tuple(rows.nonzero()[0].tolist())}")
