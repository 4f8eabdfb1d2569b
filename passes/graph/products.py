"""Products of an attention, however they are written: their two sides as [B, H, N, d], seen through whatever layout the
model keeps them in."""

from __future__ import annotations

from typing import Any

from torch import fx

from stem_compile.passes.graph import normalize
from stem_compile.passes.graph.values import View, value

Steps = tuple[tuple[str, tuple[Any, ...]], ...]
"""Method calls, in order, as ``View`` takes them."""
PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")


def factors(op: normalize.Op) -> tuple[fx.Node, fx.Node]:
    if op.name == "einsum":
        operands = op["operands"]
        return (operands[0], operands[1]) if len(operands) == 2 else (operands[0], operands[0])
    if op.name == "baddbmm":
        return op["batch1"], op["batch2"]
    return op["input"], op["other"]


def contracts(op: normalize.Op) -> bool:
    """Whether a product sums over something: an outer product does not."""
    letters = _letters(op) if op.name == "einsum" else None
    return all(value(n).dim() >= 2 for n in factors(op)) and (
        letters is None or bool({*letters[0]} & {*letters[1]} - {*letters[2]})
    )


def operands(product: fx.Node, heads: Any) -> tuple[View, View] | None:
    """(queries [B, H, q_len, d], keys [B, Hk, kv_len, d]) of the scores' product."""
    op = normalize.read(product)
    assert op is not None
    first, second = factors(op)
    if op.name == "einsum":
        letters = _letters(op)
        if letters is None:
            return None
        a, b, out = letters
        if out[-2] not in a:
            first, second, a, b = second, first, b, a
        inner = [c for c in a if c in b and c not in out]
        orders = [_order(side, [*out[:-2], end, *inner]) for side, end in ((a, out[-2]), (b, out[-1]))]
        if len(inner) != 1 or None in orders:
            return None
        made = [
            View(n, () if o == tuple(range(len(o))) else (("permute", (o,)),))
            for n, o in zip((first, second), orders)
            if o is not None
        ]
    else:
        made = [View(first), View(second, (("transpose", (-1, -2)),))]
    q, k = (_in_four(x, value(x.node).dim(), heads) for x in made)
    return None if q is None or k is None else (q, k)


def weighted_values(last: fx.Node, heads: Any) -> tuple[View, Steps] | None:
    """(values [B, Hk, kv_len, dv], steps from [B, H, q_len, dv] to the product's own layout)."""
    op = normalize.read(last)
    assert op is not None
    second, rank = factors(op)[1], value(last).dim()
    steps: Steps = ()
    made = View(second)
    if op.name == "baddbmm":
        return None
    if op.name == "einsum":
        letters = _letters(op)
        if letters is None:
            return None
        a, b, out = letters
        width = [c for c in b if c not in a]
        order, back = _order(b, [*a[:-2], a[-1], *width]), _order([*a[:-1], *width], list(out))
        if len(width) != 1 or order is None or back is None:
            return None
        made = View(second, () if order == tuple(range(len(order))) else (("permute", (order,)),))
        steps = () if back == tuple(range(len(back))) else (("permute", (back,)),)
    values = _in_four(made, value(second).dim(), heads)
    if values is None:
        return None
    if rank == 3:
        steps = ((("flatten", (0, 1)),) if heads is not None else (("squeeze", (0,)),)) + steps
    elif rank == 2:
        steps = (("squeeze", (0,)), ("squeeze", (0,)), *steps)
    return values, steps


def _letters(op: normalize.Op) -> tuple[list[str], list[str], list[str]] | None:
    equation = str(op["equation"]).replace(" ", "")
    left, arrow, out = equation.partition("->")
    sides = left.split(",")
    if (
        not arrow
        or "." in equation
        or len(sides) != 2
        or len(op["operands"]) != 2
        or any(len(set(s)) != len(s) for s in (*sides, out))
    ):
        return None
    return list(sides[0]), list(sides[1]), list(out)


def _order(have: list[str], want: list[str]) -> tuple[int, ...] | None:
    return tuple(have.index(c) for c in want) if sorted(have) == sorted(want) else None


def _in_four(view: View, rank: int, heads: Any) -> View | None:
    """The view as [B, H, N, d]. Three dimensions are (batch * heads, N, d) where the logits had four, else
    heads alone."""
    if rank == 4:
        return view
    if rank == 3 and heads is not None:
        return View(view.node, (("unflatten", (0, (-1, int(heads)))), *view.steps))
    if rank == 3:
        return View(view.node, (*view.steps, ("unsqueeze", (0,))))
    if rank == 2 and heads is None:
        return View(view.node, (*view.steps, ("unsqueeze", (0,)), ("unsqueeze", (0,))))
    return None
