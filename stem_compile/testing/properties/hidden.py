"""Hidden keys: the contents of keys that no query sees change neither the selection nor any output.

Padding, the unwritten end of a static cache, another tenant's tokens: what a mask hides from every query must not be
read, not even to score blocks, or a neighbour's text moves one's answers. Every attention that ran is run again with
other numbers in its hidden keys and values; it must select the same blocks and give the same outputs, whatever form the
mask came in.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from stem_compile.ops import SparseAttentionArgs
from stem_compile.passes.graph.sites import AttentionSite
from stem_compile.selection import Attention, Observed
from stem_compile.testing import numerics
from stem_compile.testing.case import Case
from stem_compile.testing.subject import Subject
from stem_compile.testing.violation import Inapplicable, Measure, Violation, require

NAME = "hidden-keys"
TITLE = "contents of keys that no query sees change nothing"
ORDER = 7
EXAMPLES = 6
LOUD = 8.0
"""Size of the other contents, relative to the keys' own: as large as outliers are."""


def cases(subject: Subject) -> Any:
    """Strategy of the examples to try. Raises Inapplicable where the property says nothing about the subject."""
    from stem_compile.testing.lengths import sparse
    from stem_compile.testing.strategies import cases as drawn

    if subject.expected == 0:
        raise Inapplicable("no attention is expected to be rewritten")
    return drawn(subject.source, sparse(subject), batches=(2,), pad_step=subject.block, wide=False)


def check(subject: Subject, case: Case) -> Measure:
    """Whether the property holds on one example: how close it came to failing. Raises Violation where it does not."""
    run = subject.run_of(case)
    sites = [hit for hit in run.attentions if isinstance(hit, AttentionSite)]
    if not run.selections:
        raise Inapplicable("no attention was rewritten")
    measures = [
        _changed(index, observed, site.kernel)
        for index, (observed, site) in enumerate(zip(run.selections, sites, strict=False))
        if bool(_hidden(observed.attention).any())
    ]
    if not measures:
        raise Inapplicable("every key is seen by some query of these inputs")
    return Measure(max(m.worst for m in measures))


def _hidden(attention: Attention) -> torch.Tensor:
    """bool [B, kv_len]: keys that no query of any head sees."""
    batch, _, _, kv_len = attention.shape
    return ~attention.mask.dense().any(-2).any(1).expand(batch, kv_len)


def _changed(index: int, observed: Observed, kernel: str) -> Measure:
    """Other contents in the hidden keys of one attention."""
    attention = observed.attention
    generator = torch.Generator().manual_seed(index)
    hidden = _hidden(attention)[:, None, :, None]

    def other(x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(x.shape, generator=generator).to(x) * LOUD * x.detach().abs().mean()
        return torch.where(hidden, noise, x.detach())

    again = replace(attention, k=other(attention.k), v=other(attention.v))
    args = SparseAttentionArgs.for_(again, observed.selection, kernel)
    lists = again.selection(*torch.ops.stem.select(*args.selection(kernel)))
    # Rows without a key select what they like.
    rows = observed.candidates.any(-1, keepdim=True)
    before, after = observed.selection.dense(observed.candidates), lists.dense(observed.candidates)
    moved = ((before != after) & rows).any(-1)
    if bool(moved.any()):
        place = tuple(moved.nonzero()[0].tolist())
        raise Violation(f"attention {index} selects other blocks at (batch, head, query block) = {place}")
    outputs = [
        torch.ops.stem.sparse_attention(*SparseAttentionArgs.for_(a, observed.selection, kernel))
        for a in (attention, again)
    ]
    visible = attention.mask.dense().any(-1).expand(outputs[0].shape[:3])
    allowed = numerics.tolerance(outputs[0], outputs[0].double(), outputs[0].dtype, visible)
    return require(numerics.gap(outputs[1], outputs[0], allowed, visible), f"attention {index} reads hidden keys")
