"""Choose kernels: every sparse attention carries a kernel name, and scoring fuses with selection into one
``stem::select``."""

from __future__ import annotations

import operator

from torch import fx

from stem_compile import ops
from stem_compile.kernels import launch
from stem_compile.ops import SparseAttentionArgs
from stem_compile.passes.graph.call import call
from stem_compile.passes.graph.sites import AttentionSite
from stem_compile.passes.graph.values import value
from stem_compile.selection import Attention


def lower(graph: fx.Graph, site: AttentionSite) -> None:
    """Rewrite ``graph`` in place and set ``site.kernel``."""
    args = SparseAttentionArgs.of(site.node)
    q, k, v = (value(n) for n in (args.q, args.k, args.v))
    names = launch.kernels(Attention(q, k, v, args.mask, args.scale, args.spec, args.score))
    site.kernel = names.attend
    with graph.inserting_before(site.node):
        selected = call(graph, ops.SELECT, args.selection(names.select), site.node)
        for index, part in enumerate((args.indices, args.counts)):
            part.replace_all_uses_with(call(graph, operator.getitem, (selected, index), site.node))
    site.node.args = SparseAttentionArgs.of(site.node).with_kernel(names.attend)
