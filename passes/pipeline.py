"""The passes in order: expand, match, analyze_masks, decide, insert_selection, lower, cleanup; each checked by verify
where asked."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch import fx

from stem_compile.config import StemConfig
from stem_compile.passes import verify
from stem_compile.passes.analyze_masks import analyze_masks
from stem_compile.passes.cleanup import cleanup
from stem_compile.passes.decide import decide
from stem_compile.passes.expand import bound, expand, overwritten
from stem_compile.passes.graph.sites import AttentionSite, Rejected
from stem_compile.passes.insert_selection import insert_selection
from stem_compile.passes.lower import lower
from stem_compile.passes.match import match

log = logging.getLogger(__name__)


@dataclass
class Rewrite:
    """Result of the pipeline. found: every attention in order. changed: whether the graph differs from what came in."""

    module: fx.GraphModule
    found: list[AttentionSite | Rejected]

    @property
    def sites(self) -> list[AttentionSite]:
        """The attentions that were rewritten."""
        return [hit for hit in self.found if isinstance(hit, AttentionSite)]

    @property
    def changed(self) -> bool:
        return bool(self.sites)


def copied(graph: fx.Graph) -> fx.Graph:
    """The graph again, with the example values of its nodes."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    for node in graph.nodes:
        if node.op == "output":
            list(copy.nodes)[-1].meta = dict(node.meta)
    return copy


def analyze(graph: fx.Graph, config: StemConfig) -> list[AttentionSite | Rejected]:
    """Everything up to the first change of an attention; fused ones are written out before."""
    expand(graph)
    before = graph.python_code("self").src if config.verify else ""
    found = match(graph)
    if config.verify:
        verify.after_match(graph, before, found)
    found = decide(analyze_masks(found, config), config)
    if config.verify:
        verify.after_analyze(found)
    return found


def run(module: fx.GraphModule, config: StemConfig) -> Rewrite:
    """Rewrite ``module`` in place; a graph without a site is returned as it came."""
    fused = any(bound(n) is not None or overwritten(n) is not None for n in module.graph.nodes)
    pristine = copied(module.graph) if fused else module.graph
    graph = module.graph
    result = Rewrite(module, analyze(graph, config))
    sites = result.sites
    if not sites:
        module.graph = pristine
        return result
    replaced = {site.node for site in sites}
    roots = [n for site in sites for n in site.node.all_input_nodes if n not in replaced]
    insert_selection(graph, sites, config)
    roots += [part for site in sites for part in site.node.args[3:5] if isinstance(part, fx.Node)]
    if config.verify:
        verify.after_insert(graph, sites)
    lower(graph, sites)
    if config.verify:
        verify.after_lower(graph, sites)
    cleanup(graph, roots)
    if config.verify:
        verify.after_cleanup(graph, sites)
    module.recompile()
    log.debug("rewrote %d of %d attentions", len(sites), len(result.found))
    return result
