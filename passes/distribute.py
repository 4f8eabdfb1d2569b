"""Attentions over the tokens of all ranks: each rank computes its own queries against everybody's keys and values.

A model that is run on a rank's tokens (``distributed.shard``) sees a short sequence, and what its masks say of
positions in it is meant of the whole one. So this pass gathers keys, values and what masks read of them, in the order
of the sequence, and writes an attention a chunk of queries, whose positions are moved to where the chunk stands. What
follows (selection, kernels) sees the queries of a chunked prefill. A site that this cannot be done for must not stay
dense: it would answer from a part of the prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
import torch.nn.functional as F
from sympy.core.function import AppliedUndef
from torch import fx

from stem_compile.algebra import masks, symbolic
from stem_compile.algebra.scores import Score
from stem_compile.algebra.symbolic import KV, KV_LEN, Q_LEN, Q
from stem_compile.distributed.split import TokenSplit
from stem_compile.passes.graph.call import call
from stem_compile.passes.graph.normalize import spelling
from stem_compile.passes.graph.sites import AttentionSite, Rejected
from stem_compile.passes.graph.values import View, module_path, value

ALONG_TOKENS = frozenset(
    ("cumsum", "cumprod", "cummax", "cummin", "diff", "roll", "flip", "sort", "argsort", "conv1d", "unfold")
)
"""Operators that mix neighbours: over a rank's tokens they are not what they are over the sequence."""


class NotDistributed(ValueError):
    """A graph whose attentions cannot be computed over all ranks. The message names what is in the way."""


def check(attentions: Sequence[AttentionSite | Rejected], split: TokenSplit) -> None:
    """Raise NotDistributed unless every attention of a graph can be computed over the ranks of ``split``."""
    for hit in attentions:
        if isinstance(hit, Rejected):
            raise NotDistributed(f"{module_path(hit.node)} cannot be computed over {split.ranks} ranks: {hit.words}")
        local = _local_length(hit, split)
        for node in _before(hit, attentions):
            known = value(node)
            if spelling(node) in ALONG_TOKENS and local in getattr(known, "shape", ()):
                raise NotDistributed(
                    f"{node.name} ({spelling(node)}) combines neighbouring tokens, of which a rank holds a part only"
                )
    for site in attentions:
        _check_positions(site, attentions, _local_length(site, split))  # type: ignore[arg-type]


def distribute(graph: fx.Graph, site: AttentionSite, split: TokenSplit) -> list[AttentionSite]:
    """Write ``site`` as one attention a chunk of this rank's queries. Rewrites ``graph`` in place; the chunks' sites
    are attentions that insert_selection replaces in their turn. Raises NotDistributed."""
    local = _local_length(site, split)
    chunk = split.chunk_length(local)
    with graph.inserting_before(site.node):
        q, k, v = (x.emit(graph) if isinstance(x, View) else x for x in (site.q, site.k, site.v))
        k, v = (_gathered(graph, x, 2, split, site.node) for x in (k, v))
        tokens = _Tokens.of(site, local)
        tensors = [x.emit(graph) if isinstance(x, View) else x for x in site.tensors]
        for number, dim in tokens.of_keys.items():
            tensors[number] = _gathered(graph, tensors[number], dim, split, site.node)
        parts = []
        for place, number in enumerate(split.held):
            cut: dict[Any, Any] = {n: (dim, place * chunk, chunk) for n, dim in tokens.of_queries.items()}
            parts.append(
                _part(
                    graph,
                    site,
                    View(q, (("narrow", (2, place * chunk, chunk)),)).emit(graph),
                    (k, v),
                    [View(t, (("narrow", cut[n]),)).emit(graph) if n in cut else t for n, t in enumerate(tensors)],
                    tokens.moved(number * chunk, chunk, local * split.ranks),
                )
            )
        nodes = [p.node for p in parts]
        whole = call(graph, torch.cat, (nodes, 2), site.node) if len(nodes) > 1 else nodes[0]
        result = View(whole, site.result).emit(graph)
    site.node.replace_all_uses_with(result)
    graph.erase_node(site.node)
    site.node = whole
    return parts


def _part(
    graph: fx.Graph,
    site: AttentionSite,
    q: fx.Node,
    keys: tuple[fx.Node, fx.Node],
    tensors: list[Any],
    moved: Any,
) -> AttentionSite:
    """The attention of one chunk of queries. moved: what positions in expressions become."""
    group = value(q).shape[1] != value(keys[0]).shape[1]
    node = graph.call_function(F.scaled_dot_product_attention, (q, *keys), {"enable_gqa": group})
    node.meta = dict(site.node.meta)
    shape = value(q)
    node.meta["example_value"] = shape.new_empty(*shape.shape[:3], value(keys[1]).shape[3])
    assert site.mask is not None
    part = dataclasses.replace(
        site,
        node=node,
        q=q,
        k=keys[0],
        v=keys[1],
        mask_node=None,
        logits=None,
        product=None,
        mods=None,
        gate=None,
        result=(),
        mask=masks.predicate(moved(site.mask.predicate)),
        average=None if site.average is None else masks.predicate(moved(site.average.predicate)),
        unseen=None if site.unseen is None else moved(site.unseen),
        score=Score(moved(site.score.expr), None if site.score.sink is None else moved(site.score.sink)),
        tensors=tensors,
    )
    part.given_scale, part.name = site.given_scale, site.name
    return part


def _gathered(graph: fx.Graph, x: fx.Node, dim: int, split: TokenSplit, origin: fx.Node) -> fx.Node:
    """All ranks' tokens in dimension ``dim``, by a functional collective that Inductor may move and overlap."""
    collectives = torch.ops._c10d_functional
    known = value(x)
    bits: tuple[tuple[str, tuple[Any, ...]], ...] = (("to", (torch.uint8,)),) if known.dtype == torch.bool else ()
    whole = View(x, (*bits, ("contiguous", ()))).emit(graph)
    flat = call(graph, collectives.all_gather_into_tensor.default, (whole, split.ranks, split.group), origin)
    ready = call(graph, collectives.wait_tensor.default, (flat,), origin)
    stacked = View(ready, (("reshape", (split.ranks, *map(int, known.shape))),))
    ordered = (("movedim", (0, dim)), ("flatten", (dim, dim + 1)))
    # split.places says it for every order; the two below say it in fewer nodes, which grow with the ranks there.
    pieces: list[tuple[tuple[str, tuple[Any, ...]], ...]]
    if split.table:
        chunk = split.chunk_length(int(known.shape[dim]))
        pieces = [(("select", (0, r)), ("narrow", (dim, place * chunk, chunk))) for r, place in split.places]
    elif split.order == "zigzag":
        half = int(known.shape[dim]) // 2
        heads, tails = (("narrow", (dim + 1, start, half)) for start in (0, half))
        pieces = [(heads, *ordered), (tails, ("flip", (0,)), *ordered)]
    else:
        pieces = [ordered]
    parts = [View(stacked.node, (*stacked.steps, *steps)).emit(graph) for steps in pieces]
    joined = call(graph, torch.cat, (parts, dim), origin) if len(parts) > 1 else parts[0]
    return View(joined, (("to", (torch.bool,)),)).emit(graph) if known.dtype == torch.bool else joined


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """Where a site's mask and score read tensors by token. of_queries, of_keys: the dimension, by the tensor's
    number."""

    of_queries: Mapping[int, int]
    of_keys: Mapping[int, int]

    @classmethod
    def of(cls, site: AttentionSite, local: int) -> _Tokens:
        """Raises NotDistributed for a tensor that is read by token in another way than at its query or its key."""
        assert site.mask is not None
        average = None if site.average is None else site.average.predicate
        expressions = [site.mask.predicate, site.score.expr, site.score.sink, average, site.unseen]
        loads = {f for e in expressions if e is not None for f in sympy.sympify(e).atoms(AppliedUndef)}
        dims: dict[Any, dict[int, int]] = {Q: {}, KV: {}}
        for load in loads:
            number = symbolic.load_index(load)
            if number is None:
                continue
            shape = value(site.tensors[number]).shape
            by_token = [(d, a) for d, a in enumerate(load.args) if d < len(shape) and int(shape[d]) == local and a != 0]
            by_token = [(d, a) for d, a in by_token if a.has(Q, KV)]
            if any(a not in dims for _, a in by_token) or len(by_token) > 1:
                raise NotDistributed(
                    f"{site.name}: the mask or bias T{number} {tuple(shape)} holds numbers for pairs of tokens, of"
                    " which a rank knows its own only; give the model attention_mask and position_ids of"
                    " stem_compile.distributed.shard instead"
                )
            for dim, place in by_token:
                if dims[place].setdefault(number, dim) != dim:
                    raise NotDistributed(f"{site.name}: T{number} is read by token in two of its dimensions")
        both = dims[Q].keys() & dims[KV].keys()
        if both:
            # One copy for queries, one for keys.
            for number in sorted(both):
                site.tensors.append(site.tensors[number])
                _point(site, number, len(site.tensors) - 1)
            return cls.of(site, local)
        return cls(dims[Q], dims[KV])

    def moved(self, offset: int, chunk: int, total: int) -> Any:
        """A function that puts positions of a rank's sequence where they stand in the whole one. Loads of queries stay
        at their place in the chunk."""

        def move(expr: Any) -> Any:
            kept = {f: sympy.Dummy() for f in sympy.sympify(expr).atoms(AppliedUndef) if self._stays(f)}
            there = sympy.sympify(expr).xreplace(kept)
            there = there.xreplace({Q: Q + offset, Q_LEN: sympy.Integer(total), KV_LEN: sympy.Integer(total)})
            return there.xreplace({dummy: f for f, dummy in kept.items()})

        return move

    def _stays(self, load: Any) -> bool:
        number = symbolic.load_index(load)
        return number in self.of_queries


def _point(site: AttentionSite, number: int, twin: int) -> None:
    """Have what reads tensor ``number`` at its key read tensor ``twin``."""

    def pointed(expr: Any) -> Any:
        loads = {
            f: symbolic.tensor(twin)(*f.args)
            for f in sympy.sympify(expr).atoms(AppliedUndef)
            if symbolic.load_index(f) == number and KV in f.free_symbols
        }
        return sympy.sympify(expr).xreplace(loads)

    assert site.mask is not None
    site.mask = masks.predicate(pointed(site.mask.predicate))
    site.average = None if site.average is None else masks.predicate(pointed(site.average.predicate))
    site.unseen = None if site.unseen is None else pointed(site.unseen)
    site.score = Score(pointed(site.score.expr), None if site.score.sink is None else pointed(site.score.sink))


def _local_length(site: AttentionSite, split: TokenSplit) -> int:
    """Tokens that a rank holds. A symbolic length is fixed: chunks are cut where the graph is compiled."""
    q_len, kv_len = value(site.q).shape[2], value(site.k).shape[2]
    if int(q_len) != int(kv_len):
        raise NotDistributed(
            f"{site.name}: {int(q_len)} queries and {int(kv_len)} keys on a rank; tokens in a cache are not split over"
            " ranks yet: run the prefill without past keys"
        )
    split.chunk_length(int(q_len))
    return int(q_len)


def _before(site: AttentionSite, others: Sequence[AttentionSite | Rejected]) -> list[fx.Node]:
    """Nodes that a site is computed from, back to the attentions before it."""
    ends = {hit.node for hit in others}
    sources = [site.q, site.k, site.v, *site.tensors]
    frontier = [x.node if isinstance(x, View) else x for x in sources]
    reached: dict[fx.Node, None] = {}
    while frontier:
        node = frontier.pop()
        if not isinstance(node, fx.Node) or node in reached or node in ends:
            continue
        reached[node] = None
        frontier.extend(node.all_input_nodes)
    return list(reached)


def _check_positions(site: AttentionSite, others: Sequence[AttentionSite | Rejected], local: int) -> None:
    """Queries and keys must not know positions that the model counts itself: a rank's first token is not number 0."""
    plain = dataclasses.replace(site, tensors=[])
    for node in _before(plain, others):
        known = value(node)
        counted = spelling(node) == "arange" and local in known.shape
        if counted:
            raise NotDistributed(
                f"{site.name}: queries and keys depend on positions that the model counts itself ({node.name}), which"
                " are those of a rank; pass position_ids of stem_compile.distributed.shard"
            )
