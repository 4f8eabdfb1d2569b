"""The way of attention weights from the softmax to the product with the values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from stem_compile.passes.graph import normalize
from stem_compile.passes.graph.memory import functional, mutates
from stem_compile.passes.graph.products import contraction, inserted_places, is_product
from stem_compile.passes.graph.sites import Rejected
from stem_compile.passes.graph.values import value
from stem_compile.passes.patterns.parts.scores import reads_elements
from stem_compile.passes.patterns.parts.softmax import RESHAPING, keeps_scores
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


STEPS = 4
"""Steps from attention weights to the values, at most."""


@dataclass(frozen=True)
class Weighing:
    """The product of attention weights with values.

    product: its node. weights: its factor that holds the weights. cleared: whether hidden keys' weights are set to 0
    before. first: how many columns in front of the keys' are cut off before, those of a sink.
    """

    product: fx.Node
    weights: fx.Node
    cleared: bool = False
    first: int = 0


def weighing(softmax: fx.Node) -> Weighing | Rejected | None:
    """Where the weights meet the values; None where the softmax is no attention's."""
    node, cleared, first = softmax, False, 0
    while True:
        users = [u for u in node.users if reads_elements(u)]
        if len(users) != 1 or users[0].op == "output":
            weighs = any(is_product(u) for u in users)
            return Rejected(softmax, Reason.ESCAPES, f"{node.name} is used {len(users)} times") if weighs else None
        user = users[0]
        if (product := _product_of(node, user)) is not None:
            return Weighing(product, node, cleared, first)
        op = normalize.read(user) or functional(user)
        if op is None or is_product(user):
            turned = f"{user.name} turns the weights before they meet the values"
            return Rejected(softmax, Reason.SHAPE, turned) if is_product(user) or leads_to_product(user) else None
        if op.name == "dropout":
            if op["p"] and op["training"]:
                return Rejected(softmax, Reason.DROPOUT, f"p={op['p']}")
        elif op.name == "getitem":
            cut = _sink_columns(op["index"], value(node), value(user))
            if cut is None:
                return None
            first += cut
        elif op.name in RESHAPING:
            if not keeps_scores(node, user):
                return None
        elif op.name == "masked_fill" and _is_zero(op["value"]) and _fills_alike(softmax, op["mask"]):
            cleared = True  # hidden keys have no weight already
        elif op.name not in _PASSING:
            return (
                Rejected(softmax, Reason.ESCAPES, f"{user.name} changes the weights after the softmax")
                if leads_to_product(user)
                else None
            )
        node = user


def _product_of(weights: fx.Node, user: fx.Node) -> fx.Node | None:
    """The product that ``user`` is, or is a part of where it is written as a multiplication that is summed up."""
    for _ in range(4):
        form = contraction(user)
        if form is not None:
            return user if form.with_left(lambda side: side.node is weights) is not None else None
        op = normalize.read(user)
        inserts = op is not None and (
            op.name == "unsqueeze"
            or (op.name == "getitem" and inserted_places(op["index"], value(user).dim()) is not None)
        )
        if op is None or not (inserts or op.name == "mul") or len(user.users) != 1:
            return None
        user = next(iter(user.users))
    return None


def _sink_columns(index: Any, before: torch.Tensor, after: torch.Tensor) -> int | None:
    """How many columns an index cuts off in front, a sink's; None where it does more than cut columns off one end."""
    parts = index if isinstance(index, tuple) else (index,)
    last = parts[-1]
    plain = all(p is Ellipsis or p == slice(None) for p in parts[:-1])
    if not plain or not isinstance(last, slice) or last.step is not None or before.dim() != after.dim():
        return None
    if last.start in (None, 0):
        return 0
    whole = (parts[0] is Ellipsis or len(parts) == before.dim()) and isinstance(last.start, int) and last.start > 0
    return last.start if whole and last.stop is None else None


def _is_zero(number: Any) -> bool:
    op = normalize.read(number)
    return (
        value(number if op is None else op.args.get("data")) == 0
        if op is None or op.name in ("tensor", "scalar_tensor")
        else False
    )


def _fills_alike(softmax: fx.Node, mask: Any) -> bool:
    """Whether the logits were filled by the same mask."""
    op = normalize.read(softmax)
    op = None if op is None or op.name != "softmax" else normalize.read(op["input"])
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


def leads_to_product(node: fx.Node) -> bool:
    """Whether a few steps further on a product follows."""
    frontier = {node}
    for _ in range(STEPS):
        frontier = {u for n in frontier for u in n.users}
        if any(is_product(u) for u in frontier):
            return True
    return False
