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


def lower(graph: fx.Graph, sites: list[AttentionSite]) -> None:
    """Rewrite ``graph`` in place and set ``site.kernel``."""
    for site in sites:
        fakes = [value(n) for n in (site.q, site.k, site.v)]
        attention = site.node
        *head, _, score = attention.args
        q, k, v, indices, _, *mask_arguments, scale, spec = head
        texts = (str(mask_arguments[-1]), str(spec), str(score))
        site.kernel = launch.kernel_name(fakes[0], fakes[1], fakes[2], *texts)
        attention.args = (*head, site.kernel, score)
        assert isinstance(indices, fx.Node)
        with graph.inserting_before(attention):
            fused = (
                q,
                k,
                v,
                *mask_arguments,
                scale,
                spec,
                launch.select_name(fakes[0], fakes[1], fakes[2], *texts),
                score,
            )
            selected = call(graph, ops.SELECT, fused, attention)
            for i, part in ((3, indices), (4, head[4])):
                item = call(graph, operator.getitem, (selected, i - 3), attention)
                assert isinstance(part, fx.Node)
                part.replace_all_uses_with(item)
