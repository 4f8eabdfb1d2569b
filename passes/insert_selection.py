"""Replace each site by ``stem::oam_scores -> stem::tpd_select -> stem::sparse_attention``. The graph then runs on the
reference."""

from __future__ import annotations

import operator

from torch import fx

from stem_compile import ops
from stem_compile.algebra import masks
from stem_compile.config import StemConfig
from stem_compile.kernels import crossover
from stem_compile.passes.average_blind import average_blind
from stem_compile.passes.graph import normalize
from stem_compile.passes.graph.call import call
from stem_compile.passes.graph.values import View, value
from stem_compile.passes.sites import AttentionSite, Rejected
from stem_compile.reasons import Reason


def decide(found: list[AttentionSite | Rejected], config: StemConfig) -> list[AttentionSite | Rejected]:
    """Apply the user's options and the lengths. Comparing a symbolic length installs a guard: another length compiles
    anew, once."""
    decided: list[AttentionSite | Rejected] = []
    for hit in found:
        decided.append(hit if isinstance(hit, Rejected) else _decided(hit, config))
    allowed = config.fuel if config.fuel is not None else len(decided)
    for i, hit in enumerate(decided):
        if isinstance(hit, AttentionSite):
            allowed -= 1
            if allowed < 0:
                decided[i] = Rejected(hit.node, Reason.FUEL, f"fuel={config.fuel}")
    return decided


def _decided(site: AttentionSite, config: StemConfig) -> AttentionSite | Rejected:
    if config.keeps_dense(site.index):
        return Rejected(site.node, Reason.DENSE_LAYER, f"attention {site.index}")
    kv_len = value(site.k).shape[2]
    if isinstance(kv_len, int) and kv_len == 0:
        return Rejected(site.node, Reason.SHORT, "no keys")
    shortest = config.shortest
    # Short whatever was measured; a symbolic length is compared once only, since each comparison installs a guard.
    asked = config.min_length is not None or (isinstance(kv_len, int) and kv_len < shortest)
    if not asked:
        masked = site.mask_node is not None
        shortest = crossover.shortest(
            value(site.q), value(site.k), value(site.v), config.selection.text(), masked, shortest
        )
    if kv_len < shortest:
        if shortest > config.shortest:
            return Rejected(
                site.node,
                Reason.SLOWER,
                f"{kv_len} keys; selecting wins from {shortest}" if shortest < crossover.NEVER else f"{kv_len} keys",
            )
        return Rejected(site.node, Reason.SHORT, f"{kv_len} keys, min_length {shortest}")
    return site


def insert_selection(graph: fx.Graph, sites: list[AttentionSite], config: StemConfig) -> None:
    """Rewrite ``graph`` in place; ``site.node`` becomes the sparse_attention node."""
    spec = config.selection.text()
    replaced: dict[fx.Node, fx.Node] = {}
    blind: dict[str, fx.Node] = {}
    for site in sites:
        assert site.mask is not None
        with graph.inserting_before(site.node):
            # An attention may read another one directly.
            site.q, site.k, site.v = (_placed(x, graph, replaced) for x in (site.q, site.k, site.v))
            mask = ([replaced.get(t, t) for t in site.tensors], site.scalars, masks.encode(site.mask))
            scores = call(
                graph, ops.OAM_SCORES, (site.q, site.k, site.v, *mask, site.scale, spec, site.score.text), site.node
            )
            selected = call(graph, ops.TPD_SELECT, (scores, site.q, site.k, *mask, spec), site.node)
            parts = [call(graph, operator.getitem, (selected, i), site.node) for i in range(2)]
            arguments = (site.q, site.k, site.v, *parts, *mask, site.scale, spec, ops.REFERENCE, site.score.text)
            attention = call(graph, ops.SPARSE_ATTENTION, arguments, site.node)
            whole = attention if site.average is None else average_blind(attention, site, blind)
            result = View(whole, site.result).emit(graph)
        site.node.replace_all_uses_with(result)
        relax_views(whole)
        graph.erase_node(site.node)
        replaced[site.node] = result
        site.node = attention


def _placed(x: fx.Node | View, graph: fx.Graph, replaced: dict[fx.Node, fx.Node]) -> fx.Node:
    if isinstance(x, View):
        return View(replaced.get(x.node, x.node), x.steps).emit(graph)
    return replaced.get(x, x)


def relax_views(attention: fx.Node) -> None:
    """Turn ``view`` behind an attention into ``reshape``: strides differ from SDPA's, and what view refuses reshape
    copies."""
    frontier = [attention]
    while frontier:
        for user in frontier.pop().users:
            name = normalize.spelling(user)
            if name == "view" and user.op == "call_method":
                user.target = "reshape"
            elif name in ("transpose", "permute", "contiguous", "getitem", "unsqueeze", "squeeze", "detach"):
                frontier.append(user)
