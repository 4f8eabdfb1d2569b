"""Kernel exactness: the compiled output equals the model with dense attention under exactly the blocks that were
selected.

The selections of the compiled run are captured and the model's own graph is run in fp64 with dense attention restricted
to them. So a difference is a fault of a kernel (or of how it is called), never the approximation. The tolerance is
that of the same restricted run in the model's dtype. One attention an example is also computed with its queries scaled
until scores reach ``PEAK``, where a softmax without its maximum overflows; models rarely reach that by themselves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from stem_compile.kernels.reference import sparse_attention
from stem_compile.ops import SparseAttentionArgs
from stem_compile.passes.graph.sites import AttentionSite
from stem_compile.selection import Observed
from stem_compile.testing import numerics
from stem_compile.testing.case import Case
from stem_compile.testing.oracle import Mismatch, restricted
from stem_compile.testing.subject import Subject
from stem_compile.testing.violation import Inapplicable, Measure, Violation, require

NAME = "kernel-exactness"
TITLE = "equals dense attention under the selected blocks"
ORDER = 2
EXAMPLES = 10
PEAK = 200.0
"""exp(200) overflows fp32, and exp(200 - max) does not."""


def cases(subject: Subject) -> Any:
    """Strategy of the examples to try. Raises Inapplicable where the property says nothing about the subject."""
    from stem_compile.testing.lengths import sparse
    from stem_compile.testing.strategies import cases as drawn

    return drawn(subject.source, sparse(subject), wide=False)


def check(subject: Subject, case: Case) -> Measure:
    """Whether the property holds on one example: how close it came to failing. Raises Violation where it does not."""
    run, inputs = subject.run_of(case), subject.inputs(case)
    if not run.selections:
        raise Inapplicable("no attention was rewritten")
    try:
        own, _ = subject.oracle.run(inputs, run.selections, subject.config, exact=False)
    except Mismatch as error:
        raise Violation(str(error)) from None
    try:
        golden, _ = subject.oracle.run(inputs, run.selections, subject.config, exact=True)
    except Mismatch as error:
        raise Violation(str(error)) from None
    except Exception as error:
        # What a model does between its graphs stays in its own dtype, and need not take fp64.
        first = (str(error).splitlines() or [""])[0]
        raise Inapplicable(
            "the model does not run in fp64, which others are compared with, graph by graph:"
            f" {type(error).__name__}: {first}"
        ) from error
    allowed = numerics.tolerance(own, golden, subject.dtype, inputs.valid)
    measure = require(
        numerics.gap(run.output, golden, allowed, inputs.valid), "the output is not that of the selected blocks"
    )
    sites = [hit for hit in run.attentions if isinstance(hit, AttentionSite)]
    index = case.seed % len(run.selections)
    stressed = _stressed(run.selections[index], sites[index].kernel)
    return Measure(max(measure.worst, stressed.worst), {"density": run.selections[index].density})


def _stressed(observed: Observed, kernel: str) -> Measure:
    """The kernel alone, on scores that reach ``PEAK``."""
    attention, selection = observed.attention, observed.selection
    q, k, v = (x.detach() for x in (attention.q, attention.k, attention.v))
    products = q.double() @ k.double().repeat_interleave(attention.group, 1).transpose(-1, -2)
    peak = attention.scale * float(products.abs().max())
    q = (q * (PEAK / max(peak, 1e-3))).to(q.dtype)
    attention = replace(attention, q=q, k=k, v=v)
    args = SparseAttentionArgs.for_(attention, selection, kernel)
    out = torch.ops.stem.sparse_attention(*args)
    if attention.score_text:
        # The definition that kernels are held to; SDPA has no such scores.
        golden, own = sparse_attention(attention.to(torch.float64), selection), sparse_attention(attention, selection)
    else:
        computed, size = selection.dense(observed.candidates), (selection.block_q, selection.block_k)
        rest = (attention.mask.dense(), False, attention.scale, computed, size)
        golden, own = restricted(q.double(), k.double(), v.double(), *rest), restricted(q, k, v, *rest)
    return require(
        numerics.gap(out, golden, numerics.tolerance(own, golden, q.dtype)),
        f"kernel {kernel!r} is off for scores up to {PEAK:g}",
    )
