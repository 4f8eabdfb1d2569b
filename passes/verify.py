"""What must hold after each step (see docs/design.md). Raised errors are bugs of this project, never of the user's
graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from stem_compile import ops
from stem_compile.passes.graph.average_blind import averaged
from stem_compile.passes.graph.sites import AttentionSite, Rejected
from stem_compile.passes.graph.values import View, value
from stem_compile.passes.reading.expressions import as_expr


class PassError(AssertionError):
    """A pass left the graph in a state that its successors do not expect."""


def after_match(graph: fx.Graph, before: str, attentions: list[AttentionSite | Rejected]) -> None:
    """The graph is untouched."""
    _require(graph.python_code("self").src == before, "match changed the graph")


def after_analyze(attentions: list[AttentionSite | Rejected]) -> None:
    """Every site has an understood mask, and as many tensors and scalars as it reads."""
    for hit in attentions:
        if isinstance(hit, AttentionSite):
            _require(hit.mask is not None, f"{hit.node.name} has no mask")


def after_insert(graph: fx.Graph, sites: list[AttentionSite]) -> None:
    """Every site is a sparse_attention fed by a selection, whose rows without a key are the mean of all values where
    they were."""
    graph.lint()
    for site in sites:
        _require(site.node.target is ops.SPARSE_ATTENTION, f"{site.node.name} was not rewritten")
        _require(
            averaged(site.node) == (site.average is not None),
            f"{site.node.name}: rows that see no key give something else than they did",
        )


def after_lower(graph: fx.Graph, sites: list[AttentionSite]) -> None:
    """Every sparse attention has a kernel and is fed by one fused selection."""
    graph.lint()
    for site in sites:
        args = ops.SparseAttentionArgs.of(site.node)
        selected = args.indices.args[0] if isinstance(args.indices, fx.Node) else None
        named = args.kernel == site.kernel and site.kernel not in ("", ops.REFERENCE)
        _require(named, f"{site.node.name} has no kernel")
        _require(
            isinstance(selected, fx.Node) and selected.target is ops.SELECT, f"{site.node.name} has no fused selection"
        )


def after_cleanup(graph: fx.Graph, sites: list[AttentionSite]) -> None:
    """No tensor of q_len x kv_len is left above a rewritten attention, but where it is the mask or the bias itself that
    was not understood."""
    graph.lint()
    for site in sites:
        left = [] if keeps_tensor(site) else quadratic(graph, site)
        _require(not left, f"{site.node.name} still needs {[n.name for n in left]}")
        _require(
            site.product not in graph.nodes or site.product is None, f"{site.node.name}: its scores are still computed"
        )


def keeps_tensor(site: AttentionSite) -> bool:
    """Whether the site reads a tensor of q_len x kv_len, in whatever order: its mask or its bias was not recovered."""
    lengths = {str(as_expr(value(n).shape[2])) for n in (site.q, site.k)}
    return any(sum(str(as_expr(n)) in lengths for n in value(t).shape) > 1 for t in site.tensors)


def quadratic(graph: fx.Graph, site: AttentionSite) -> list[fx.Node]:
    """Nodes whose last two dimensions are q_len x kv_len among those that the site's mask and score are read from."""
    q_len, kv_len = value(site.q).shape[2], value(site.k).shape[2]
    frontier = [t.node if isinstance(t, View) else t for t in site.tensors]
    above = set(frontier)
    while frontier:
        for node in frontier.pop().all_input_nodes:
            if node not in above:
                above.add(node)
                frontier.append(node)
    return [n for n in graph.nodes if n in above and _spans(value(n), q_len, kv_len)]


def _spans(tensor: Any, q_len: Any, kv_len: Any) -> bool:
    if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2 or tensor.is_floating_point():
        return False
    return bool(as_expr(tensor.shape[-2]) == as_expr(q_len) and as_expr(tensor.shape[-1]) == as_expr(kv_len))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PassError(message)
