"""The passes in order: expand, match, analyze_masks, decide, compare, insert_selection, lower, cleanup; each checked by
verify where asked.

A site is a transaction: ``rewrite`` undoes everything and starts again without the attention that a step failed on.
``run`` is one attempt, and raises.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import fx
from torch._logging._internal import trace_structured

from stem_compile.config import StemConfig
from stem_compile.distributed.split import TokenSplit
from stem_compile.ops import SparseAttentionArgs
from stem_compile.passes import verify
from stem_compile.passes.analyze_masks import analyze_masks
from stem_compile.passes.cleanup import cleanup
from stem_compile.passes.compare import compare
from stem_compile.passes.decide import decide
from stem_compile.passes.distribute import NotDistributed, check, distribute
from stem_compile.passes.expand import bound, expand, overwritten
from stem_compile.passes.graph.memory import all_written
from stem_compile.passes.graph.regions import Region, bodies, regions
from stem_compile.passes.graph.sites import AttentionSite, Rejected, failed
from stem_compile.passes.graph.values import value
from stem_compile.passes.insert_selection import Insertion, insert_selection
from stem_compile.passes.lower import lower
from stem_compile.passes.match import attends, match
from stem_compile.reasons import Reason

log = logging.getLogger(__name__)

Hit = AttentionSite | Rejected


@dataclass
class Rewrite:
    """Result of the pipeline. attentions: every attention in order, those of graphs inside the graph included."""

    module: fx.GraphModule
    attentions: list[Hit]

    @property
    def sites(self) -> list[AttentionSite]:
        """The attentions that were rewritten."""
        return [hit for hit in self.attentions if isinstance(hit, AttentionSite)]

    @property
    def rejected(self) -> list[Rejected]:
        """The attentions that stay as they were."""
        return [hit for hit in self.attentions if isinstance(hit, Rejected)]

    @property
    def changed(self) -> bool:
        """Whether the graph differs from what came in."""
        return bool(self.sites)


@dataclass(frozen=True)
class Numbers:
    """Where a graph stands in its model. first: number of its first attention; used: attentions of earlier graphs
    that count against ``fuel``."""

    first: int = 0
    used: int = 0


ATTEMPTS = 8
"""Attentions that may fail, each in its turn, before the whole graph is left as it came."""


class SiteFailure(Exception):
    """A step failed on one attention. place: its position among those found; step: the step's name."""

    def __init__(self, place: int, step: str, error: Exception) -> None:
        super().__init__(f"{step}: {type(error).__name__}: {error}")
        self.place, self.step, self.error = place, step, error


Watcher = Callable[[str, fx.GraphModule], None]
"""Called after each pass with its name and the graph."""
_watchers: list[Watcher] = []


@contextlib.contextmanager
def watch(callback: Watcher) -> Iterator[None]:
    """Show ``callback`` every graph after every pass inside the ``with``."""
    _watchers.append(callback)
    try:
        yield
    finally:
        _watchers.remove(callback)


def readable(module: fx.GraphModule) -> str:
    """A graph as text, with those inside it and what is known of its values."""
    try:
        return str(module.print_readable(print_output=False, include_stride=True, include_device=True))
    except Exception:
        return str(module.graph)


def _after(step: str, module: fx.GraphModule) -> None:
    """Show a graph to those who watch, and to ``TORCH_TRACE``, whose logs tlparse reads."""
    for callback in _watchers:
        callback(step, module)
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"stem_after_{step}", "encoding": "string"},
        payload_fn=lambda: readable(module),
    )


def rewrite(module: fx.GraphModule, config: StemConfig, numbers: Numbers | None = None) -> Rewrite:
    """Rewrite ``module`` in place. An attention that a step fails on stays as it was, with ``Reason.INTERNAL``; so do
    all where no single one can be blamed. Raises NotDistributed, under ``context_parallel``, and nothing else."""
    numbers = numbers or Numbers()
    pristine = [(region.module, copied(region.graph)) for region in regions(module)]
    failures: dict[int, SiteFailure] = {}
    while True:
        try:
            return run(module, config, numbers, failures)
        except SiteFailure as failure:
            log.debug("a step failed on one attention", exc_info=True)
            _restore(pristine)
            if failure.place in failures or len(failures) == ATTEMPTS:
                return _dense(module, failure.step, failure.error)
            failures[failure.place] = failure
        except NotDistributed:
            _restore(pristine)
            raise
        except Exception as error:
            log.debug("the pipeline failed; the graph stays as it was", exc_info=True)
            _restore(pristine)
            return _dense(module, "pipeline", error)


def run(
    module: fx.GraphModule,
    config: StemConfig,
    numbers: Numbers | None = None,
    failures: Mapping[int, SiteFailure] | None = None,
) -> Rewrite:
    """One attempt. A graph without a site is left as it came. Raises SiteFailure for a step after ``decide`` that
    fails; failures: attentions to leave out because one did."""
    plans = [Plan(region) for region in regions(module)]
    attentions = _planned(plans, config, numbers or Numbers(), failures or {})
    for plan in plans:
        hits = [(place, hit) for place, hit in enumerate(attentions) if hit.node.graph is plan.region.graph]
        _apply(plan, {place: hit for place, hit in hits if isinstance(hit, AttentionSite)}, config)
    result = Rewrite(module, attentions)
    if result.changed:
        module.recompile()
    log.debug("rewrote %d of %d attentions", len(result.sites), len(attentions))
    return result


@dataclass
class Plan:
    """One graph on its way. pristine: what it was before ``expand``, where that changes anything; broken: fused nodes
    that could not be written out, and why."""

    region: Region
    pristine: fx.Graph | None = None
    broken: Mapping[fx.Node, Exception] = field(default_factory=dict)


def analyze(module: fx.GraphModule, config: StemConfig) -> list[Hit]:
    """Everything up to the first change of an attention; fused ones are written out before."""
    return _planned([Plan(region) for region in regions(module)], config, Numbers(), {})


def _planned(plans: list[Plan], config: StemConfig, numbers: Numbers, failures: Mapping[int, SiteFailure]) -> list[Hit]:
    matched: dict[fx.GraphModule, list[Hit]] = {}
    for plan in plans:
        graph = plan.region.graph
        if any(bound(n) is not None or overwritten(n) is not None for n in graph.nodes):
            plan.pristine = copied(graph)
        _after("capture", plan.region.module)
        plan.broken = expand(graph)
        _after("expand", plan.region.module)
        before = graph.python_code("self").src if config.verify else ""
        hits = [failed(h.node, "expand", plan.broken[h.node]) if h.node in plan.broken else h for h in match(graph)]
        if config.verify:
            verify.after_match(graph, before, hits)
        if not plan.region.inline:
            hits = [Rejected(h.node, Reason.REGION, plan.region.operator) for h in hits]
        matched[plan.region.module] = analyze_masks(hits, config)
    attentions = _in_order(plans[0].region.module, matched)
    for place, hit in enumerate(attentions):
        if isinstance(hit, AttentionSite):
            hit.index = numbers.first + place
        if place in failures:
            attentions[place] = failed(hit.node, failures[place].step, failures[place].error)
    if config.fuel is not None:
        config = dataclasses.replace(config, fuel=max(0, config.fuel - numbers.used))
    attentions = compare(decide(attentions, config))
    if config.verify:
        verify.after_analyze(attentions)
    if config.context_parallel is not None:
        for plan in plans:
            own = [hit for hit in attentions if hit.node.graph is plan.region.graph]
            check(own, config.context_parallel)
    return attentions


def _in_order(module: fx.GraphModule, matched: dict[fx.GraphModule, list[Hit]]) -> list[Hit]:
    """Attentions as they are run: those of a body stand where its operator stands, once however often it is called."""
    own = matched.pop(module, [])
    inside = [(node, body) for node in module.graph.nodes for body in bodies(node)]
    if not inside:
        return own
    ordered: list[Hit] = []
    for node, body in inside:
        before = [hit for hit in own if hit.node < node]
        own = own[len(before) :]
        ordered += [*before, *_in_order(body, matched)]
    return ordered + own


def _apply(plan: Plan, sites: dict[int, AttentionSite], config: StemConfig) -> None:
    """Rewrite one graph. sites: its attentions by their place among all."""
    graph = plan.region.graph
    if not sites:
        if plan.pristine is not None:
            plan.region.module.graph = plan.pristine
        return
    split = config.context_parallel
    if split is not None:
        _apply_over_ranks(plan, list(sites.values()), split, config)
        return
    replaced = {site.node for site in sites.values()}
    roots = {place: [n for n in site.node.all_input_nodes if n not in replaced] for place, site in sites.items()}
    state = Insertion(config.selection.text(), config.fallback, all_written(graph))
    for place, site in sites.items():
        state.spec = config.selection_of(site.index).text()
        with _blamed(place, "insert_selection"):
            insert_selection(graph, site, state)
            args = SparseAttentionArgs.of(site.node)
            roots[place] += [args.indices, args.counts]
            if config.verify:
                verify.after_insert(graph, [site])
    _after("insert_selection", plan.region.module)
    for place, site in sites.items():
        with _blamed(place, "lower"):
            lower(graph, site)
            if config.verify:
                verify.after_lower(graph, [site])
    _after("lower", plan.region.module)
    for place in sites:
        with _blamed(place, "cleanup"):
            cleanup(graph, roots[place])
    _after("cleanup", plan.region.module)
    if config.verify:
        for place, site in sites.items():
            with _blamed(place, "cleanup"):
                verify.after_cleanup(graph, [site])
    plan.region.module.recompile()


def _apply_over_ranks(plan: Plan, sites: list[AttentionSite], split: TokenSplit, config: StemConfig) -> None:
    """Rewrite one graph of a rank. A chunk's selection is that of the whole prompt."""
    graph = plan.region.graph
    state = Insertion("", config.fallback, all_written(graph))
    parts = []
    for site in sites:
        length = int(value(site.q).shape[2]) * split.ranks
        spec = config.selection_of(site.index)
        spec = dataclasses.replace(spec, prompt_length=spec.prompt_length or length)
        for part in distribute(graph, site, split):
            state.spec = spec.text()
            insert_selection(graph, part, state)
            parts.append(part)
    _after("distribute", plan.region.module)
    for part in parts:
        lower(graph, part)
        if config.verify:
            verify.after_lower(graph, [part])
    for site in sites:
        site.kernel = parts[0].kernel
    graph.eliminate_dead_code()
    _after("lower", plan.region.module)
    plan.region.module.recompile()


@contextlib.contextmanager
def _blamed(place: int, step: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise SiteFailure(place, step, error) from error


def _restore(pristine: list[tuple[fx.GraphModule, fx.Graph]]) -> None:
    for module, graph in pristine:
        module.graph = copied(graph)


def _dense(module: fx.GraphModule, step: str, error: Exception) -> Rewrite:
    """The graph as it came, whose attentions are those that show at first sight: no step can be asked."""
    nodes = (node for region in regions(module) for node in region.graph.nodes)
    return Rewrite(module, [failed(node, step, error) for node in nodes if attends(node)])


def copied(graph: fx.Graph) -> fx.Graph:
    """The graph again, with the example values of its nodes and what Dynamo wrote on them."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    for node, twin in zip(graph.nodes, copy.nodes, strict=True):
        if node.op == "output":
            twin.meta = dict(node.meta)
        # Attributes that torch does not copy: AOTAutograd asks inputs for their ``_dynamo_source``.
        for name in vars(node).keys() - vars(twin).keys():
            setattr(twin, name, getattr(node, name))
    return copy


def copied_module(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph module over graphs of its own; parameters are shared."""
    twin = fx.GraphModule(module, copied(module.graph))
    twin.meta = dict(module.meta)
    for name, child in module.named_children():
        # Bodies of higher-order operators, which the passes rewrite in place too.
        if isinstance(child, fx.GraphModule):
            setattr(twin, name, copied_module(child))
    return twin
