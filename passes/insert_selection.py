"""Replace each site by ``stem::oam_scores -> stem::tpd_select -> stem::sparse_attention``. The graph then runs on the
reference."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

from torch import fx

from stem_compile import ops
from stem_compile.algebra import masks
from stem_compile.passes.graph.average_blind import average_blind
from stem_compile.passes.graph.call import call
from stem_compile.passes.graph.layout import is_layout_visible, layout_steps
from stem_compile.passes.graph.memory import Memory
from stem_compile.passes.graph.sites import AttentionSite
from stem_compile.passes.graph.values import View, value


@dataclass
class Insertion:
    """What the attentions of one graph share while they are rewritten. spec: the selection as text; fallback: what
    happens when a kernel fails; replaced: former attention -> its result; blind: rows that earlier layers asked for, by
    what they asked; writes: memory that the graph writes in place."""

    spec: str
    fallback: str = "dense"
    writes: Memory = frozenset()
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)
    blind: dict[str, fx.Node] = field(default_factory=dict)


def insert_selection(graph: fx.Graph, site: AttentionSite, state: Insertion) -> None:
    """Rewrite ``graph`` in place; ``site.node`` becomes the sparse_attention node."""
    assert site.mask is not None
    spec, replaced = state.spec, state.replaced
    with graph.inserting_before(site.node):
        # An attention may read another one directly.
        site.q, site.k, site.v = (_placed(x, graph, replaced) for x in (site.q, site.k, site.v))
        tensors = [_placed(t, graph, replaced) for t in site.tensors]
        site.tensors = [*tensors]
        mask = (tensors, site.scalars, masks.encode(site.mask))
        scores = call(
            graph, ops.OAM_SCORES, (site.q, site.k, site.v, *mask, site.scale, spec, site.score.text), site.node
        )
        selected = call(graph, ops.TPD_SELECT, (scores, site.q, site.k, *mask, spec), site.node)
        parts = [call(graph, operator.getitem, (selected, i), site.node) for i in range(2)]
        arguments = (
            site.q,
            site.k,
            site.v,
            *parts,
            *mask,
            site.scale,
            spec,
            ops.REFERENCE,
            site.score.text,
            state.fallback,
        )
        attention = call(graph, ops.SPARSE_ATTENTION, arguments, site.node)
        whole = attention if site.average is None else average_blind(attention, site, state.blind)
        result = View(whole, site.result).emit(graph)
        if is_layout_visible(site.node, value(result), state.writes):
            result = View(result, layout_steps(value(result), value(site.node))).emit(graph)
    site.node.replace_all_uses_with(result)
    graph.erase_node(site.node)
    replaced[site.node] = result
    site.node = attention


def _placed(x: fx.Node | View, graph: fx.Graph, replaced: dict[fx.Node, fx.Node]) -> fx.Node:
    if isinstance(x, View):
        return View(replaced.get(x.node, x.node), x.steps).emit(graph)
    return replaced.get(x, x)
