"""The products that logits are computed from, and who else reads what lies between."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from stem_compile.passes.graph import normalize
from stem_compile.passes.graph.memory import functional, mutates
from stem_compile.passes.graph.products import contraction, is_product
from stem_compile.passes.graph.values import value
from stem_compile.passes.patterns.parts.softmax import RESHAPING, keeps_scores
from stem_compile.passes.reading.expressions import is_one
from stem_compile.passes.reading.interpret import readers

_MOVING = ("getitem", "pad", "transpose", "permute", "t", "select", "narrow", "flip", "gather", "repeat", "as_strided")
"""Operations after which an element is no longer at the place of its own query and key."""


def score_products(logits: fx.Node) -> list[fx.Node]:
    """Products that the logits are computed from, element by element, in the graph's order; where there are none, those
    that reach them through shifts and transpositions."""
    moved: dict[fx.Node, bool] = {logits: False}
    frontier = [logits]
    direct: list[fx.Node] = []
    shifted: list[fx.Node] = []
    length = str(value(logits).shape[-2])
    while frontier:
        node = frontier.pop()
        if (form := contraction(node)) is not None:
            if len(form.out) >= 2 and str(value(node).shape[-2]) == length:
                (shifted if moved[node] else direct).append(node)
            continue
        op = normalize.read(node) or functional(node)
        if op is None or op.name not in readers():
            continue
        for source in node.all_input_nodes:
            # What a condition is made of is no score.
            known = value(source)
            if isinstance(known, torch.Tensor) and known.dtype != torch.bool:
                moves = moved[node] or _moves(op, source, node)
                if source not in moved or (moved[source] and not moves):
                    moved[source] = moves
                    frontier.append(source)
    return sorted(set(direct) or set(shifted))


def unread_between(logits: fx.Node) -> fx.Node | None:
    """An operation without a reader between logits and a product that they are computed from; None where no product is
    behind it within a few steps."""
    known = {logits}
    frontier: list[tuple[fx.Node, fx.Node | None]] = [(logits, None)]
    while frontier:
        node, unread = frontier.pop(0)
        if is_product(node):
            return unread
        op = normalize.read(node) or functional(node)
        stop = unread if op is not None and op.name in readers() else unread or node
        sources = [n for n in node.all_input_nodes if n not in known and isinstance(value(n), torch.Tensor)]
        square = [n for n in sources if value(n).dim() > 1 and keeps_scores(n, logits)]
        known.update(square)
        frontier += [(n, stop) for n in square]
    return None


def is_square(logits: fx.Node) -> bool:
    """Whether logits have a row and a column for every token."""
    shape = value(logits).shape
    return len(shape) > 1 and not is_one(shape[-1]) and str(shape[-1]) == str(shape[-2])


def _moves(op: normalize.Op, source: fx.Node, node: fx.Node) -> bool:
    if op.name in RESHAPING:
        return value(source).dim() < 2 or value(node).dim() < 2 or not keeps_scores(source, node)
    return op.name in _MOVING


def other_reader(product: fx.Node, softmax: fx.Node) -> fx.Node | None:
    """A node outside the attention that reads its scores; None when there is none."""
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
            outside = user not in inside and user is not softmax and reads_elements(user)
            if outside and not _reads_shape(user, node):
                return user
    return None


def reads_elements(user: fx.Node) -> bool:
    """Whether a user does something with elements: a write has no value of its own."""
    return isinstance(value(user), torch.Tensor) or user.op == "output" or mutates(user)


def _reads_shape(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` takes only shape, dtype or device from ``node``."""
    op = normalize.read(user)
    return op is not None and op.name in normalize.LIKE and ("other" not in op.args or op["input"] is not node)


def sink_gate(reader: Any, logits: fx.Node, weighted: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(g, the node of ``weighted * sigmoid(logsumexp(logits) - g)``) where ``reader`` is that logsumexp: a sink of
    logit g written as a gate on the output."""
    op = normalize.read(reader)
    if (
        op is None
        or op.name != "logsumexp"
        or op["dim"] not in (-1, (-1,), [-1])
        or op["keepdim"]
        or op["input"] is not logits
    ):
        return None
    node, gate, steps = reader, None, ["logsumexp"]
    while len(node.users) == 1:
        user = next(iter(node.users))
        step = normalize.read(user)
        if step is None:
            return None
        if step.name == "sub" and step["input"] is node and step["alpha"] == 1 and isinstance(step["other"], fx.Node):
            gate = step["other"]
        elif step.name == "mul" and steps[-1] == "unsqueeze":
            other = step["other"] if step["input"] is node else step["input"]
            whole = gate is not None and "sigmoid" in steps and other is weighted and len(weighted.users) == 1
            return (gate, user) if whole and gate is not None else None
        elif step.name not in ("to", "float", "sigmoid", "unsqueeze"):
            return None
        if step.name in ("sub", "sigmoid", "unsqueeze"):
            steps.append(step.name)
        node = user
    return None
