"""Attention written out by hand: a product of queries and keys, a softmax over the keys, a product with the values.

Whatever stands between the first product and the softmax (scale, mask, bias, softcap, sink) is read later as one
expression (``split_logits.py``), so
this file is about the products: ``matmul``, ``@``, ``bmm``, ``baddbmm`` or ``einsum``, 2 to 4 dimensions, casts and
inactive dropout on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from stem_compile.passes.graph import normalize
from stem_compile.passes.graph.memory import functional, mutates
from stem_compile.passes.graph.products import PRODUCTS, contracts, factors, operands, weighted_values
from stem_compile.passes.graph.sites import AttentionSite, Rejected
from stem_compile.passes.graph.values import value
from stem_compile.reasons import Reason

_PASSING = (
    "to",
    "type",
    "type_as",
    "float",
    "half",
    "double",
    "bfloat16",
    "contiguous",
    "clone",
    "detach",
    "alias",
    "nan_to_num",
)
_RESHAPING = ("view", "reshape", "flatten", "squeeze", "unsqueeze")


def match(node: fx.Node) -> AttentionSite | Rejected | None:
    """Site of a softmax between two products, None for any other node."""
    op = normalize.read(node)
    if (
        op is None
        or op.name != "softmax"
        or not isinstance(value(node), torch.Tensor)
        or op["dim"] not in (-1, value(node).dim() - 1)
    ):
        return None
    logits = _unshifted(op["input"])
    products = _products(logits)
    if not products:
        return None
    found = _weighted(node)
    if found is None:
        return None
    if isinstance(found, Rejected):
        return found
    if len(products) > 1:
        return Rejected(node, Reason.SHAPE, f"scores add up {len(products)} products")
    product = products[0]
    gate = None
    if escape := _escapes(product, node):
        gated = _gated(escape, logits, found)
        if gated is None:
            return Rejected(node, Reason.ESCAPES, escape.name)
        gate, found = gated
    shape = value(logits).shape
    heads = shape[1] if len(shape) == 4 else None
    last = found if gate is None else _product_under(found)
    left, right = operands(product, heads), weighted_values(last, heads)
    if left is None or right is None:
        return Rejected(
            node,
            Reason.SHAPE,
            f"{product.name} {tuple(map(str, value(product).shape))} and {last.name}"
            f" {tuple(map(str, value(last).shape))}",
        )
    return AttentionSite(
        found,
        *left,
        right[0],
        1.0,
        logits=logits,
        product=product,
        gate=gate,
        cleared=_cleared(node, last),
        result=right[1],
    )


def _gated(reader: fx.Node, logits: fx.Node, last: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(g, the node of ``out * sigmoid(logsumexp(logits) - g)``) where ``reader`` is that logsumexp: a sink written as a
    gate."""
    op = normalize.read(reader)
    if (
        op is None
        or op.name != "logsumexp"
        or op["dim"] not in (-1, (-1,), [-1])
        or op["keepdim"]
        or op["input"] is not logits
    ):
        return None
    node, gate, seen = reader, None, ["logsumexp"]
    while len(node.users) == 1:
        user = next(iter(node.users))
        step = normalize.read(user)
        if step is None:
            return None
        if step.name == "sub" and step["input"] is node and step["alpha"] == 1 and isinstance(step["other"], fx.Node):
            gate = step["other"]
        elif step.name == "mul" and seen[-1] == "unsqueeze":
            other = step["other"] if step["input"] is node else step["input"]
            whole = gate is not None and "sigmoid" in seen and other is last and len(last.users) == 1
            return (gate, user) if whole and gate is not None else None
        elif step.name not in ("to", "float", "sigmoid", "unsqueeze"):
            return None
        if step.name in ("sub", "sigmoid", "unsqueeze"):
            seen.append(step.name)
        node = user
    return None


def _product_under(gated: fx.Node) -> fx.Node:
    return next(n for n in gated.all_input_nodes if normalize.spelling(n) in PRODUCTS)


def _unshifted(logits: fx.Node) -> fx.Node:
    """Logits without what a softmax does not see: casts, the subtraction of each row's maximum, heads merged into the
    batch."""
    while (op := normalize.read(logits)) is not None:
        cast = op.name in ("to", "type", "float", "contiguous", "type_as") and isinstance(op["input"], fx.Node)
        shift = op.name == "sub" and _is_peak(op["other"], op["input"])
        merge = (
            op.name in _RESHAPING
            and value(logits).dim() == 3
            and value(op["input"]).dim() == 4
            and _keeps_scores(op["input"], logits)
        )
        if not (cast or shift or merge):
            break
        logits = op["input"]
    return logits


def _keeps_scores(before: fx.Node, after: fx.Node) -> bool:
    """Whether a view leaves the last two dimensions, queries and keys, alone."""
    return str(tuple(value(before).shape[-2:])) == str(tuple(value(after).shape[-2:]))


def _is_peak(node: Any, of: Any) -> bool:
    """Whether ``node`` is the maximum of ``of`` over its last dimension, kept as a dimension."""
    while isinstance(node, fx.Node) and (
        getattr(node.target, "__name__", "") in ("getitem", "getattr")
        or normalize.spelling(node) in ("detach", "contiguous")
    ):
        node = node.args[0]
    op = normalize.read(node)
    return (
        op is not None
        and op.name in ("max", "amax")
        and op["input"] is of
        and op["dim"] in (-1, (-1,), [-1])
        and bool(op["keepdim"])
    )


def _products(logits: fx.Node) -> list[fx.Node]:
    """Products that the logits are computed from, elementwise and through views."""
    from stem_compile.passes.reading.interpret import readers

    found, seen, frontier = [], {logits}, [logits]
    length = str(value(logits).shape[-2])
    while frontier:
        node = frontier.pop()
        op = normalize.read(node) or functional(node)
        if op is None:
            continue
        if op.name in PRODUCTS:
            if value(node).dim() >= 2 and str(value(node).shape[-2]) == length and contracts(op):
                found.append(node)
            continue
        if op.name in readers():
            # What a condition is made of is no score.
            inputs = [
                n
                for n in node.all_input_nodes
                if n not in seen and isinstance(value(n), torch.Tensor) and value(n).dtype != torch.bool
            ]
            seen.update(inputs)
            frontier.extend(inputs)
    return sorted(found)


def _weighted(softmax: fx.Node) -> fx.Node | Rejected | None:
    """The product of the weights with the values; None where the softmax is no attention's."""
    node = softmax
    while True:
        users = [u for u in node.users if _reads(u)]
        if len(users) != 1 or users[0].op == "output":
            weighing = [u for u in users if normalize.spelling(u) in PRODUCTS]
            return Rejected(softmax, Reason.ESCAPES, f"{node.name} is used {len(users)} times") if weighing else None
        user = users[0]
        op = normalize.read(user) or functional(user)
        if op is None:
            return None
        if op.name == "dropout":
            if op["p"] and op["training"]:
                return Rejected(softmax, Reason.DROPOUT, f"p={op['p']}")
        elif op.name in PRODUCTS:
            return user if factors(op)[0] is node else None
        elif op.name == "getitem":
            if not _drops_last(op["index"], value(node), value(user)):
                return None
        elif op.name in _RESHAPING:
            if not _keeps_scores(node, user):
                return None
        elif op.name == "masked_fill" and _is_zero(op["value"]) and _fills(softmax, op["mask"]):
            pass  # hidden keys have no weight already
        elif op.name not in _PASSING:
            return (
                Rejected(softmax, Reason.ESCAPES, f"{user.name} changes the weights after the softmax")
                if _leads_on(user)
                else None
            )
        node = user


def _reads(user: fx.Node) -> bool:
    """Whether a user does something with elements: a write has no value of its own."""
    return isinstance(value(user), torch.Tensor) or user.op == "output" or mutates(user)


def _cleared(softmax: fx.Node, last: fx.Node) -> bool:
    """Whether hidden keys' weights are set to 0 on the way that ``_weighted`` found."""
    node = softmax
    while node is not last:
        op = normalize.read(node) or functional(node)
        if op is not None and op.name == "masked_fill":
            return True
        node = next(u for u in node.users if isinstance(value(u), torch.Tensor))
    return False


def _is_zero(number: Any) -> bool:
    op = normalize.read(number)
    return (
        value(number if op is None else op.args.get("data")) == 0
        if op is None or op.name in ("tensor", "scalar_tensor")
        else False
    )


def _fills(softmax: fx.Node, mask: Any) -> bool:
    """Whether the logits were filled by the same mask."""
    op = normalize.read(softmax)
    op = None if op is None else normalize.read(op["input"])
    return op is not None and op.name == "masked_fill" and _alike(op["mask"], mask)


def _alike(a: Any, b: Any, depth: int = 4) -> bool:
    """Whether two nodes compute the same from the same."""
    if a is b or not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return bool(a is b or (not isinstance(a, fx.Node) and a == b))
    if (
        not depth
        or a.op != b.op
        or a.target != b.target
        or mutates(a)
        or normalize.read(a) is None
        or a.kwargs != b.kwargs
    ):
        return False
    return len(a.args) == len(b.args) and all(_alike(x, y, depth - 1) for x, y in zip(a.args, b.args))


def _leads_on(node: fx.Node) -> bool:
    """Whether a few steps further on a product follows."""
    for _ in range(4):
        users = list(node.users)
        if any(normalize.spelling(u) in PRODUCTS for u in users):
            return True
        if len(users) != 1:
            return False
        node = users[0]
    return False


def _drops_last(index: Any, before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether an index cuts columns off the end and nothing else: the sink's."""
    parts = index if isinstance(index, tuple) else (index,)
    plain = all(p is Ellipsis or p == slice(None) for p in parts[:-1])
    return (
        plain
        and isinstance(parts[-1], slice)
        and parts[-1].start in (None, 0)
        and parts[-1].step is None
        and before.dim() == after.dim()
    )


def _escapes(product: fx.Node, softmax: fx.Node) -> fx.Node | None:
    """A node outside the attention that reads scores; None when there is none."""
    above, frontier = {softmax}, [softmax]
    while frontier:
        for node in frontier.pop().all_input_nodes:
            if node not in above and node >= product:
                above.add(node)
                frontier.append(node)
    inside, frontier = {product}, [product]
    while frontier:
        for user in frontier.pop().users:
            if user in above and user is not softmax and user not in inside:
                inside.add(user)
                frontier.append(user)
    for node in inside:
        for user in node.users:
            outside = user not in inside and user is not softmax and _reads(user)
            if outside and not _reads_shape(user, node):
                return user
    return None


def _reads_shape(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` takes only shape, dtype or device from ``node``."""
    op = normalize.read(user)
    return op is not None and op.name in normalize.LIKE and ("other" not in op.args or op["input"] is not node)


def _qkv(heads: int = 4, kv_heads: int = 4, n: int = 70) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(2, h, n, 16) for h in (heads, kv_heads, kv_heads))


def _causal(n: int, value_: float = -torch.inf) -> torch.Tensor:
    return torch.full((n, n), value_).triu(1)


def examples() -> dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...]]]:
    """Name -> (function, inputs) that must match."""

    def added(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(q.shape[2])
        mask = torch.where(rows[None, :] <= rows[:, None], 0.0, torch.finfo(q.dtype).min)
        weights = F.softmax(torch.matmul(q, k.transpose(2, 3)) * 0.25 + mask, dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.matmul(F.dropout(weights, p=0.0, training=False), v)

    def filled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(q.shape[2])
        scores = (q / math.sqrt(q.shape[-1])) @ k.mT
        return scores.masked_fill(rows[None, :] > rows[:, None], -torch.inf).softmax(-1) @ v

    def einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4.0 + _causal(q.shape[1])
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)

    def three_dimensions(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        b, h, n, d = q.shape
        q, k, v = (x.reshape(b * h, n, d) for x in (q, k, v))
        scores = torch.baddbmm(torch.zeros(b * h, n, n), q, k.transpose(1, 2), beta=1.0, alpha=0.25).view(
            b, h, n, n
        ) + _causal(n)
        return torch.bmm(scores.softmax(-1).view(b * h, n, n), v).view(b, h, n, d)

    def softcapped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = torch.tanh(q @ k.transpose(-1, -2) * 0.25 / 30.0) * 30.0 + _causal(q.shape[2])
        return scores.softmax(-1) @ v

    def sinks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-1, -2) * 0.25 + _causal(q.shape[2])
        joined = torch.cat([scores, sink.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)], dim=-1)
        joined = joined - joined.max(dim=-1, keepdim=True).values
        return joined.softmax(-1)[..., :-1] @ v

    def alibi(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(q.shape[2])
        bias = slopes[:, None, None] * (rows[None, :] - rows[:, None])
        scores = q @ k.transpose(-1, -2) * 0.25 + bias
        return scores.masked_fill((rows[None, :] > rows[:, None]), torch.finfo(q.dtype).min).softmax(-1) @ v

    def in_place(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q @ k.transpose(-1, -2)
        scores *= 0.25
        scores += _causal(q.shape[2])
        return scores.softmax(-1) @ v

    def buckets(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(q.shape[2])
        distance = (rows[:, None] - rows[None, :]).clamp(0, 15)
        bias = F.embedding(distance, table).permute(2, 0, 1).unsqueeze(0)
        return (q @ k.transpose(-1, -2) + bias + _causal(q.shape[2])).softmax(-1) @ v

    def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (
            x[:, :, None].expand(x.shape[0], 2, 2, x.shape[2], 16).reshape(x.shape[0], 4, x.shape[2], 16)
            for x in (k, v)
        )
        return added(q, k, v)

    return {
        "mask added": (added, _qkv()),
        "mask filled in": (filled, _qkv()),
        "einsum": (einsum, _qkv()),
        "baddbmm": (three_dimensions, _qkv()),
        "softcap": (softcapped, _qkv()),
        "sinks": (sinks, (*_qkv(), torch.randn(4))),
        "alibi": (alibi, (*_qkv(), torch.tensor([0.5, 0.25, 0.1, 0.01]))),
        "a bias by distance": (buckets, (*_qkv(), torch.randn(16, 4))),
        "in place": (in_place, _qkv()),
        "grouped": (grouped, _qkv(4, 2)),
        "one head": (
            lambda q, k, v: (q @ k.t() + _causal(70)).softmax(-1) @ v,
            tuple(torch.randn(70, 16) for _ in range(3)),
        ),
    }


def near_misses() -> dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], Reason]]:
    """Name -> (function, inputs, reason) that must be rejected, and why."""

    def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q @ k.transpose(-1, -2) * 0.25 + _causal(q.shape[2])

    def returned(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights = scores(q, k).softmax(-1)
        return weights @ v, weights

    def scores_used(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = scores(q, k)
        return made.softmax(-1) @ v, made.sum()

    def changed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (scores(q, k).softmax(-1) * 0.5) @ v

    def overwritten(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = scores(q, k).softmax(-1)
        weights[:, :, 5] = 0
        return weights @ v

    def threshold(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        made = scores(q, k)
        return made.masked_fill(made < -0.5, -torch.inf).softmax(-1) @ v

    def buckets(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(q.shape[2])
        return (
            q @ k.mT + F.embedding((rows[:, None] - rows[None, :]).abs().clamp(max=15), table).permute(2, 0, 1)
        ).softmax(-1) @ v

    return {
        "a learned bias and no mask": (buckets, (*_qkv(), torch.randn(16, 4)), Reason.BIDIRECTIONAL),
        "weights overwritten": (overwritten, _qkv(), Reason.ESCAPES),
        "keys chosen by their scores": (threshold, _qkv(), Reason.MASK),
        "weights returned": (returned, _qkv(), Reason.ESCAPES),
        "scores used elsewhere": (scores_used, _qkv(), Reason.ESCAPES),
        "weights changed": (changed, _qkv(), Reason.ESCAPES),
        "dropout": (lambda q, k, v: F.dropout(scores(q, k).softmax(-1), 0.5) @ v, _qkv(), Reason.DROPOUT),
        "bidirectional": (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, _qkv(), Reason.BIDIRECTIONAL),
    }
