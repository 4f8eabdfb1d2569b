"""Attention written out by hand: a product of queries and keys, a softmax over the keys, a product with the values.

Whatever stands between the first product and the softmax (scale, mask, bias, softcap, sink) is read later as one
expression (``reading/``), so this pattern finds the two products and the softmax between them: ``parts/softmax.py``
knows its spellings, ``parts/scores.py`` the way up to queries and keys, ``parts/weights.py`` the way down to the
values, and ``graph/products.py`` how products are written.
"""

from __future__ import annotations

from torch import fx

from stem_compile.passes.graph import normalize
from stem_compile.passes.graph.products import score_factors, weighted_values
from stem_compile.passes.graph.sites import AttentionSite, Rejected
from stem_compile.passes.graph.values import Steps, View, value
from stem_compile.passes.patterns.parts.scores import is_square, other_reader, score_products, sink_gate, unread_between
from stem_compile.passes.patterns.parts.softmax import normalized, unshifted
from stem_compile.passes.patterns.parts.weights import Weighing, leads_to_product, weighing
from stem_compile.passes.patterns.parts.written_out_examples import examples, near_misses
from stem_compile.reasons import Reason

__all__ = ["examples", "match", "near_misses"]


def match(node: fx.Node) -> AttentionSite | Rejected | None:
    """Site of a softmax between two products, None for any other node."""
    softmax = normalized(node)
    if softmax is None:
        return _unnormalized(node)
    logits = unshifted(softmax[0])
    products = score_products(logits)
    weighed = weighing(node) if products or is_square(logits) else None
    if weighed is None or isinstance(weighed, Rejected):
        return weighed
    if not products and (unread := unread_between(logits)) is not None:
        return Rejected(node, Reason.MASK, f"{unread.name} between the scores and their softmax")
    if not products:
        return Rejected(node, Reason.SHAPE, f"{logits.name} is no product of queries and keys alone")
    if softmax[1] != -1:
        return Rejected(node, Reason.SHAPE, f"a softmax over dimension {softmax[1]}; keys must be the last one")
    result, gate = weighed.product, None
    scores = _scores(products, weighed, logits)
    if scores is None:
        shapes = ", ".join(f"{n.name} {tuple(map(str, value(n).shape))}" for n in (*products, weighed.product))
        return Rejected(node, Reason.SHAPE, shapes)
    if isinstance(scores, str):
        return Rejected(node, Reason.SHAPE, scores)
    product, queries, keys, values, steps = scores
    if reader := other_reader(product, node):
        gated = sink_gate(reader, logits, result)
        if gated is None:
            return Rejected(node, Reason.ESCAPES, reader.name)
        gate, result = gated
    return AttentionSite(
        result,
        queries,
        keys,
        values,
        1.0,
        logits=logits,
        product=product,
        gate=gate,
        cleared=weighed.cleared,
        first=weighed.first,
        result=steps,
    )


def _unnormalized(node: fx.Node) -> Rejected | None:
    """Exponentials of scores that weigh values, and that no softmax makes of them."""
    op = normalize.read(node)
    if op is None or op.name != "exp" or not isinstance(op["input"], fx.Node) or not is_square(op["input"]):
        return None
    if any(normalized(u) is not None for u in node.users) or not leads_to_product(node):
        return None
    logits = unshifted(op["input"])
    return (
        Rejected(node, Reason.SHAPE, "exponentials that are not divided by their sum")
        if score_products(logits)
        else None
    )


def _scores(
    products: list[fx.Node], weighed: Weighing, logits: fx.Node
) -> tuple[fx.Node, View, View, View, Steps] | str | None:
    """(the scores' product, queries, keys, values, steps to the result's layout); what is in the way, or None where the
    layouts are not those of one attention."""
    shape = value(logits).shape
    heads = shape[1] if len(shape) == 4 else shape[1] * shape[2] if len(shape) == 5 else None
    values = weighted_values(weighed.product, weighed.weights, heads)
    factors = {p: f for p in products if (f := score_factors(p, heads)) is not None}
    if values is None or not factors:
        return None
    if len(factors) > 1:
        return f"scores add up {len(factors)} products"
    ((product, (queries, keys)),) = factors.items()
    return product, queries, keys, *values
