"""Find every attention of a graph. The graph is untouched; each find is an ``AttentionSite`` or a ``Rejected`` with a
typed reason.

A pattern is a file in ``patterns/``, or registered by a third party; all are tried in alphabetical order. What holds
for every attention, whatever its spelling, is checked here: shapes, dtypes, gradients, and K/V that were repeated for
grouped queries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import fx

from stem_compile.kernels import launch
from stem_compile.passes.graph import normalize
from stem_compile.passes.graph.memory import written_between
from stem_compile.passes.graph.products import PRODUCTS
from stem_compile.passes.graph.sites import AttentionSite, Rejected, attempted, failed
from stem_compile.passes.graph.trace_back import CASTS, HALF, peel, unrepeated
from stem_compile.passes.graph.values import View, is_transformed, value
from stem_compile.reasons import Reason
from stem_compile.registry import Registry
from stem_compile.selection import Attention

log = logging.getLogger(__name__)

DECODE_QUERIES = 16
"""Fewer query rows than this behind a prefix are decoding, where selection has nothing to save."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FUSED = (
    "sdpa",
    "flex_attention",
    "multi_head_attention_forward",
    "_transformer_encoder_layer_fwd",
    "_native_multi_head_attention",
)
"""Operations that are an attention as a whole."""
NEAR = 8
"""Steps between a softmax and the products of its attention, at most."""
LAYOUT = ("transpose", "permute", "reshape", "view", "flatten", "contiguous", "squeeze", "unsqueeze")


@runtime_checkable
class Pattern(Protocol):
    """How one spelling of attention is found. The built-in ones are modules in ``patterns/``."""

    def match(self, node: fx.Node, /) -> AttentionSite | Rejected | None:
        """The attention whose value ``node`` is; None for any other node. The graph is not touched."""
        ...

    def examples(self) -> Mapping[str, tuple[Callable[..., object], tuple[torch.Tensor, ...]]]:
        """Name -> (function, inputs) that must match."""
        ...

    def near_misses(self) -> Mapping[str, tuple[Callable[..., object], tuple[torch.Tensor, ...], Reason]]:
        """Name -> (function, inputs, reason) that must be refused, and why."""
        ...


PATTERNS: Registry[Pattern] = Registry(
    "pattern",
    Pattern,
    folder=Path(__file__).with_name("patterns"),
    package="stem_compile.passes.patterns",
    group="stem_compile.patterns",
)
"""Third parties add one by an entry point of the group, or by ``PATTERNS.register("name", pattern)``."""


def patterns() -> tuple[Pattern, ...]:
    """Every pattern that loads, in the order of their names, which is the order in which they are tried."""
    return tuple(pattern for _, pattern in PATTERNS.members())


def match(graph: fx.Graph) -> list[AttentionSite | Rejected]:
    """Attentions of ``graph`` in execution order. A pattern that raises costs the attention it raised on, if no other
    pattern knows it."""
    known = patterns()
    hits = (_matched(node, known) for node in graph.nodes)
    attentions = [hit for hit in hits if hit is not None]
    for index, hit in enumerate(attentions):
        if isinstance(hit, AttentionSite):
            hit.index = index
    return attentions


def _matched(node: fx.Node, known: tuple[Pattern, ...]) -> AttentionSite | Rejected | None:
    if is_transformed(value(node)):
        return Rejected(node, Reason.TRANSFORM) if attends(node) else None
    failure: Exception | None = None
    for pattern in known:
        try:
            hit = pattern.match(node)
        except Exception as error:
            log.debug("a pattern failed on %s", node.name, exc_info=True)
            failure = failure or error
            continue
        if hit is not None:
            return attempted(hit, "match", _checked)
    return failed(node, "match", failure) if failure is not None and attends(node) else None


def attends(node: fx.Node) -> bool:
    """Whether a node is an attention at first sight, or the softmax of one; asked where no pattern can be."""
    name = normalize.spelling(node)
    if name != "softmax":
        return name in FUSED
    above, below = set(node.all_input_nodes), set(node.users)
    for _ in range(NEAR):
        above |= {n for a in above for n in a.all_input_nodes}
        below |= {n for b in below for n in b.users}
    return all(any(normalize.spelling(n) in PRODUCTS for n in side) for side in (above, below))


def _checked(hit: AttentionSite) -> AttentionSite | Rejected:
    if hit.product is not None:
        for factor in (hit.q, hit.k):
            read = factor.node if isinstance(factor, View) else factor
            if written_between(read, hit.node, since=hit.product):
                return Rejected(hit.node, Reason.WRITTEN, read.name)
    hit.q, hit.k, hit.v = _peeled(hit)
    tensors = [value(n) for n in (hit.q, hit.k, hit.v)]
    if not all(isinstance(t, torch.Tensor) and t.dim() == 4 for t in tensors):
        return Rejected(
            hit.node,
            Reason.SHAPE,
            "q, k, v are not 4-D: " + ", ".join(str(tuple(getattr(t, "shape", ()))) for t in tensors),
        )
    if value(hit.node).requires_grad:
        return Rejected(hit.node, Reason.GRADIENT)
    dtypes = _computed_in(hit)
    if not (dtypes[0] == dtypes[1] == dtypes[2] and dtypes[0] in DTYPES):
        return Rejected(hit.node, Reason.DTYPE, ", ".join(str(d).removeprefix("torch.") for d in dtypes))
    repeated = hit.k, hit.v
    hit.k, hit.v = (_unrepeated(x, hit.node) for x in (hit.k, hit.v))
    if value(hit.k).shape[1] != value(hit.v).shape[1]:
        hit.k, hit.v = repeated
    heads = max(int(value(hit.k).shape[1]), int(value(hit.v).shape[1]))
    hit.k, hit.v = _with_heads(hit.k, heads), _with_heads(hit.v, heads)
    q, k, v = value(hit.q), value(hit.k), value(hit.v)
    if k.shape[1] != v.shape[1]:
        return Rejected(hit.node, Reason.SHAPE, f"{k.shape[1]} key heads and {v.shape[1]} value heads")
    if int(q.shape[1]) % int(k.shape[1]):
        return Rejected(hit.node, Reason.SHAPE, f"{q.shape[1]} query heads over {k.shape[1]} key heads")
    # Comparing symbolic sizes installs guards: a cache's keys and values have lengths that Dynamo does not know to be
    # equal.
    if not (q.shape[0] == k.shape[0] == v.shape[0] and q.shape[-1] == k.shape[-1] and k.shape[2] == v.shape[2]):
        return Rejected(hit.node, Reason.SHAPE, f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if q.shape[2] != k.shape[2] and q.shape[2] < DECODE_QUERIES:
        return Rejected(hit.node, Reason.DECODE, f"{q.shape[2]} queries, {k.shape[2]} keys")
    hit.q, hit.k, hit.v = (_cast(x, dtypes[0]) for x in (hit.q, hit.k, hit.v))
    if value(hit.node).dtype != dtypes[0]:
        hit.result += (("to", (value(hit.node).dtype,)),)
    attention = Attention(value(hit.q), value(hit.k), value(hit.v))
    reason = launch.refusal(attention)
    if reason is not None:
        dims = f"head dims {attention.q.shape[-1]} and {attention.v.shape[-1]}"
        return Rejected(hit.node, reason, f"{attention.device.type}, {dims}, {dtypes[0]}")
    return hit


def _with_heads(x: fx.Node | View, heads: int) -> fx.Node | View:
    """Keys or values with as many heads as the other side has, where theirs divide them: one head is broadcast, each of
    several serves the heads that follow one another, as in attention over grouped queries."""
    own = int(value(x).shape[1])
    if own == heads or heads % own:
        return x
    step: tuple[str, tuple[int, ...]] = ("repeat_interleave", (heads // own, 1))
    if own == 1:
        step = ("expand", (-1, heads, -1, -1))
    return View(x.node, (*x.steps, step)) if isinstance(x, View) else View(x, (step,))


def _computed_in(hit: AttentionSite) -> list[torch.dtype]:
    """Dtypes that q, k and v are multiplied in: autocast narrows them on the way into a product, and only the product's
    dtype tells."""
    dtypes = [
        value(hit.node if hit.product is None or x is hit.v else hit.product).dtype for x in (hit.q, hit.k, hit.v)
    ]
    return [
        m if m in HALF and value(x).dtype == torch.float32 else value(x).dtype
        for m, x in zip(dtypes, (hit.q, hit.k, hit.v))
    ]


def _cast(x: fx.Node | View, dtype: torch.dtype) -> fx.Node | View:
    if value(x).dtype == dtype:
        return x
    return View(x.node, (*x.steps, ("to", (dtype,)))) if isinstance(x, View) else View(x, (("to", (dtype,)),))


def _unrepeated(x: fx.Node | View, site: fx.Node) -> fx.Node | View:
    return x if isinstance(x, View) else unrepeated(x, site)


def _peeled(hit: AttentionSite) -> list[fx.Node | View]:
    """q, k and v from as far up as their views and casts lead. Casts stay where the result is wanted in fp32, or where
    not all three have one."""
    drop = value(hit.node).dtype in HALF or _is_narrowed(hit.node)
    views = [_peel(x, hit.node, drop) for x in (hit.q, hit.k, hit.v)]
    if len({value(x).dtype for x in views}) > 1:
        views = [_peel(x, hit.node, False) for x in (hit.q, hit.k, hit.v)]
    return views


def _peel(x: fx.Node | View, site: fx.Node, casts: bool) -> fx.Node | View:
    """A view without steps is its node."""
    view = peel(x, site, casts) if isinstance(x, View) else x
    return view.node if isinstance(view, View) and not view.steps else view


def _is_narrowed(node: fx.Node) -> bool:
    """Whether all that is done with a result, views aside, is a cast to half precision."""
    known = [value(u) for u in node.users]
    if not all(isinstance(t, torch.Tensor) for t in known):
        return False
    ends = [
        (t.dtype in HALF and normalize.spelling(u) in CASTS) or (normalize.spelling(u) in LAYOUT and _is_narrowed(u))
        for t, u in zip(known, node.users)
    ]
    return bool(ends) and all(ends)
