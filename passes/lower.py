"""Choose kernels: every sparse attention carries a kernel name, and scoring fuses with selection into one
``stem::select``."""

from __future__ import annotations

import operator

from torch import fx

from stem_compile import ops
from stem_compile.kernels import launch
from stem_compile.passes.graph.call import call
from stem_compile.passes.graph.sites import AttentionSite
from stem_compile.passes.graph.values import value


def lower(graph: fx.Graph, site: AttentionSite) -> None:
    """Rewrite ``graph`` in place and set ``site.kernel``."""
    fakes = [value(n) for n in (site.q, site.k, site.v)]
    attention = site.node
    *head, _, score = attention.args
    q, k, v, indices, counts, *mask_arguments, scale, spec = head
    texts = (str(mask_arguments[-1]), str(spec), str(score))
    site.kernel = launch.kernel_name(fakes[0], fakes[1], fakes[2], *texts)
    attention.args = (*head, site.kernel, score)
    select = launch.select_name(fakes[0], fakes[1], fakes[2], *texts)
    with graph.inserting_before(attention):
        selected = call(graph, ops.SELECT, (q, k, v, *mask_arguments, scale, spec, select, score), attention)
        for i, part in enumerate((indices, counts)):
            item = call(graph, operator.getitem, (selected, i), attention)
            assert isinstance(part, fx.Node)
            part.replace_all_uses_with(item)
