"""Products of tensors in one normal form, however they are written: two factors with a letter for each dimension, as an
einsum names them.

``matmul``, ``@``, ``bmm``, ``baddbmm``, ``mm``, ``addmm``, ``linear``, ``inner``, ``tensordot``, ``einsum`` (ellipsis
and implicit output included) and a multiplication that is summed up all give a ``Contraction``. What an attention needs
of its two products, [B, H, N, d] views of queries, keys and values, is asked of that form alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from stem_compile.passes.graph import normalize
from stem_compile.passes.graph.memory import functional
from stem_compile.passes.graph.values import Steps, View, size_of, value


@dataclass(frozen=True)
class Factor:
    """One side of a product. letters: name of each dimension of ``node``; None for one of size 1 that is broadcast."""

    node: fx.Node
    letters: tuple[str | None, ...]


@dataclass(frozen=True)
class Contraction:
    """``out[letters of out] = sum over the others of left * right``."""

    left: Factor
    right: Factor
    out: tuple[str, ...]

    @property
    def summed(self) -> tuple[str, ...]:
        """Letters that both factors have and the result has not, in the left factor's order."""
        return tuple(c for c in self.left.letters if c is not None and c in self.right.letters and c not in self.out)

    def with_left(self, holds: Callable[[Factor], bool]) -> Contraction | None:
        """The same product with the factor first for which ``holds``; None where it holds for none or both."""
        sides = holds(self.left), holds(self.right)
        if sides[0] == sides[1]:
            return None
        return self if sides[0] else Contraction(self.right, self.left, self.out)


def contraction(node: Any) -> Contraction | None:
    """The normal form of a product of two tensors; None for any other node and for one that sums over nothing."""
    op = normalize.read(node) or functional(node)
    if op is None or op.name not in _FORMS or not isinstance(value(node), torch.Tensor):
        return None
    form = _FORMS[op.name](op)
    if form is None or len(form.out) != value(node).dim() or not form.summed:
        return None
    lost = {c for side in (form.left, form.right) for c in side.letters if c is not None} - {*form.out, *form.summed}
    return None if lost else form


def is_product(node: Any) -> bool:
    """Whether ``node`` multiplies two tensors and sums over something."""
    return contraction(node) is not None


def score_factors(product: fx.Node, heads: Any) -> tuple[View, View] | None:
    """(queries [B, H, q_len, d], keys [B, Hk, kv_len, d]) of the scores' product; None where its layout is not that of
    one attention.

    heads: number of heads that the first dimension of a three-dimensional product holds beside the batch, None where it
    is the batch alone.
    """
    form = contraction(product)
    if form is None or len(form.out) < 2:
        return None
    *outer, row, column = form.out
    form = form.with_left(lambda side: row in side.letters)
    if form is None or column not in form.right.letters:
        return None
    if not set(outer) <= set(form.left.letters) or row in form.right.letters:
        return None
    queries = arranged(form.left, [*outer, row, *form.summed])
    keys = arranged(form.right, [*(c for c in outer if c in form.right.letters), column, *form.summed])
    if queries is None or keys is None:
        return None
    merged = len(form.summed)
    return _both(
        _in_four(queries, outer, outer, heads, merged),
        _in_four(keys, outer, [c for c in outer if c in form.right.letters], heads, merged),
    )


def weighted_values(last: fx.Node, weights: fx.Node, heads: Any) -> tuple[View, Steps] | None:
    """(values [B, Hk, kv_len, dv], steps from [B, H, q_len, dv] to the layout of ``last``) of the product of
    ``weights`` with the values; None where its layout is not that of one attention."""
    form = contraction(last)
    op = normalize.read(last) or functional(last)
    form = None if form is None or op is None or op.name in ADDS else form.with_left(lambda side: side.node is weights)
    if form is None or None in form.left.letters or len(form.left.letters) < 2:
        return None
    *outer, row, column = (c for c in form.left.letters if c is not None)
    width = [c for c in form.right.letters if c is not None and c not in form.left.letters]
    if form.summed != (column,) or len(width) != 1 or row in form.right.letters:
        return None
    native = [c for c in outer if c in form.right.letters]
    values = arranged(form.right, [*native, column, *width])
    back = permutation([*outer, row, *width], form.out)
    wide = None if values is None or back is None else _in_four(values, outer, native, heads, 1)
    split = _from_four(last, outer, form.out, heads)
    if wide is None or back is None or split is None:
        return None
    last_step: Steps = () if back == tuple(range(len(back))) else (("permute", (back,)),)
    return wide, split + last_step


def arranged(side: Factor, order: Sequence[str]) -> View | None:
    """The factor with its dimensions in ``order``; None where they are not those."""
    steps: list[tuple[str, tuple[Any, ...]]] = []
    for place in reversed([n for n, c in enumerate(side.letters) if c is None]):
        steps.append(("squeeze", (place,)))
    moved = permutation([c for c in side.letters if c is not None], order)
    if moved is None:
        return None
    rank = len(moved)
    if rank > 1 and moved == (*range(rank - 2), rank - 1, rank - 2):
        steps.append(("transpose", (-1, -2)))
    elif moved != tuple(range(rank)):
        steps.append(("permute", (moved,)))
    return View(side.node, tuple(steps))


def permutation(have: Sequence[str], want: Sequence[str]) -> tuple[int, ...] | None:
    """Places of the letters of ``want`` among those of ``have``, None where they are not the same letters."""
    return tuple(have.index(c) for c in want) if sorted(have) == sorted(want) else None


ADDS = ("baddbmm", "addmm")
"""Products that add a first tensor to what they multiply."""


def _both(queries: View | None, keys: View | None) -> tuple[View, View] | None:
    return None if queries is None or keys is None else (queries, keys)


def _in_four(view: View, outer: Sequence[str], own: Sequence[str], heads: Any, merged: int) -> View | None:
    """The view, whose dimensions are ``own`` of the letters ``outer``, a length and ``merged`` feature dimensions, as
    [B, heads, N, d].

    outer: letters before the length in the queries: (batch, head), (batch, key head, head within its group), a batch
    alone, or nothing. A factor that lacks the last of them is shared by those heads.
    """
    steps: list[tuple[str, tuple[Any, ...]]] = list(view.steps)
    if merged > 1:
        steps.append(("flatten", (-merged, -1)))
    if list(own) != list(outer[: len(own)]) or (outer and not own):
        return None
    if len(outer) == 3:
        steps += [("flatten", (1, 2))] if len(own) == 3 else [("unsqueeze", (1,))] if len(own) == 1 else []
    elif len(outer) == 2:
        steps += [("unsqueeze", (1,))] if len(own) == 1 else []
    elif len(outer) == 1 and heads is not None:
        steps.insert(0, ("unflatten", (0, (-1, int(heads)))))
        steps = [steps[0], *(_one_dimension_later(s) for s in steps[1:])]
    elif len(outer) == 1:
        steps.append(("unsqueeze", (1,)))
    elif not outer:
        steps += [("unsqueeze", (0,)), ("unsqueeze", (0,))]
    else:
        return None
    return View(view.node, tuple(steps))


def _one_dimension_later(step: tuple[str, tuple[Any, ...]]) -> tuple[str, tuple[Any, ...]]:
    """A step on a tensor as it reads once the first dimension is two."""
    name, arguments = step
    if name == "permute":
        order = arguments[0]
        return name, (tuple(n for d in order for n in ((0, 1) if d == 0 else (d + 1,))),)
    if name == "squeeze":
        return name, tuple(a + 1 if a >= 0 else a for a in arguments)
    return step


def _from_four(last: fx.Node, outer: Sequence[str], out: Sequence[str], heads: Any) -> Steps | None:
    """Steps from [B, H, q_len, dv] to the dimensions ``outer``, a length and a width; None where the graph holds no
    size to split the heads by."""
    if len(outer) == 3:
        groups, within = (size_of(value(last).shape[out.index(c)], last) for c in outer[1:])
        if groups is None and within is None:
            return None
        # Only one size of a view can be inferred.
        return (("unflatten", (1, (-1 if groups is None else groups, -1 if within is None else within))),)
    if len(outer) == 1:
        return (("flatten", (0, 1)),) if heads is not None else (("squeeze", (1,)),)
    return () if outer else (("squeeze", (0,)), ("squeeze", (0,)))


def _aligned(shapes: Sequence[Sequence[Any]]) -> list[list[str | None]]:
    """Letters for dimensions that broadcast, aligned at the end; None where one of size 1 meets a larger one."""
    rank = max(len(s) for s in shapes)
    wide = [
        any(not (isinstance(n, int) and n == 1) for s in shapes if (n := _size(s, place, rank)) is not None)
        for place in range(rank)
    ]
    letters: list[list[str | None]] = []
    for s in shapes:
        own = range(rank - len(s), rank)
        letters.append(
            [None if wide[p] and isinstance(s[p - rank], int) and s[p - rank] == 1 else f"batch{p - rank}" for p in own]
        )
    return letters


def _size(shape: Sequence[Any], place: int, rank: int) -> Any:
    return shape[place - rank] if place >= rank - len(shape) else None


def _batched(first: Any, second: Any) -> Contraction | None:
    """``first [..., n, k] @ second [..., k, m]``."""
    shapes = [value(n).shape for n in (first, second)]
    if any(len(s) < 2 for s in shapes):
        return None
    a, b = _aligned([s[:-2] for s in shapes])
    out = [c for c in (a if len(a) >= len(b) else b)]
    short = b if len(a) >= len(b) else a
    for n in range(1, len(short) + 1):
        out[-n] = out[-n] or short[-n]
    if None in out:
        return None
    return Contraction(
        Factor(first, (*a, "row", "k")), Factor(second, (*b, "k", "column")), (*(c for c in out if c), "row", "column")
    )


def _linear(op: normalize.Op) -> Contraction | None:
    """``input [..., k] @ weight [m, k]^T``."""
    first, second = op["input"], op[("other" if op.name == "inner" else "weight")]
    if op.args.get("bias") is not None or any(value(n).dim() < 2 for n in (first, second)):
        return None
    a = tuple(f"left{n}" for n in range(value(first).dim() - 1))
    b = tuple(f"right{n}" for n in range(value(second).dim() - 1))
    return Contraction(Factor(first, (*a, "k")), Factor(second, (*b, "k")), (*a, *b))


def _tensordot(op: normalize.Op) -> Contraction | None:
    first, second, dims = op["input"], op["other"], op["dims"]
    ranks = value(first).dim(), value(second).dim()
    if isinstance(dims, int):
        dims = [list(range(ranks[0] - dims, ranks[0])), list(range(dims))]
    if not isinstance(dims, list | tuple) or len(dims) != 2:
        return None
    pairs = [
        [d % rank for d in (side if isinstance(side, list | tuple) else (side,))] for side, rank in zip(dims, ranks)
    ]
    a: list[str] = [f"left{n}" for n in range(ranks[0])]
    b: list[str] = [f"right{n}" for n in range(ranks[1])]
    for n, (x, y) in enumerate(zip(*pairs)):
        a[x] = b[y] = f"k{n}"
    out = [c for c in (*a, *b) if not c.startswith("k")]
    return Contraction(Factor(first, tuple(a)), Factor(second, tuple(b)), tuple(out))


def _einsum(op: normalize.Op) -> Contraction | None:
    """Two operands, no letter twice on a side; an ellipsis stands for dimensions aligned at the end."""
    equation, operands = _equation(op)
    if equation is None or len(operands) != 2:
        return None
    left, arrow, out = equation.partition("->")
    sides = left.split(",")
    if len(sides) != 2:
        return None
    rests = []
    for side, operand in zip(sides, operands):
        width = len(side.replace("...", ""))
        shape = value(operand).shape
        place = side.find("...")
        rests.append(shape[place : place + len(shape) - width] if place >= 0 else shape[:0])
    shared = _aligned(rests)
    wide = [f"batch{n}" for n in range(-max(map(len, rests)), 0)]
    letters = [_spelled(side, rest) for side, rest in zip(sides, shared)]
    if not arrow:
        every = "".join(sides).replace(".", "")
        out = "..." + "".join(sorted(c for c in set(every) if every.count(c) == 1))
    result = [c for c in _spelled(out, list(wide)) if c is not None]
    named = [[c for c in s if c is not None] for s in letters] + [result]
    if any(len(set(s)) != len(s) for s in named):
        return None
    first, second = (Factor(n, tuple(s)) for n, s in zip(operands, letters))
    return Contraction(first, second, tuple(result))


def _equation(op: normalize.Op) -> tuple[str | None, tuple[Any, ...]]:
    """(equation, operands), also of ``einsum(a, [0, 1], b, [1, 2], [0, 2])``; None where numbers do not spell one."""
    if isinstance(op["equation"], str):
        return op["equation"].replace(" ", ""), op["operands"]
    parts = (op["equation"], *op["operands"])
    sides, operands = parts[1::2], parts[: len(parts) // 2 * 2 : 2]
    lists = [*sides, *(parts[-1:] if len(parts) % 2 else ())]
    if not all(isinstance(s, list | tuple) and all(isinstance(n, int) and n < 26 for n in s) for s in lists):
        return None, operands
    spelled = ["".join(chr(ord("a") + n) for n in s) for s in lists]
    return ",".join(spelled[: len(sides)]) + (f"->{spelled[-1]}" if len(parts) % 2 else ""), operands


def _spelled(side: str, rest: Sequence[str | None]) -> list[str | None]:
    before, dots, after = side.partition("...")
    return [*before, *(rest if dots else ()), *after]


def _summed(op: normalize.Op) -> Contraction | None:
    """``(a * b).sum(dims)``: both factors without the dimensions that only broadcast."""
    inner = normalize.read(op["input"])
    dims = op["dim"] if isinstance(op["dim"], list | tuple) else (op["dim"],)
    if inner is None or inner.name != "mul" or op["keepdim"] or not all(isinstance(d, int) for d in dims):
        return None
    sides = [inner["input"], inner["other"]]
    if not all(isinstance(n, fx.Node) and isinstance(value(n), torch.Tensor) for n in sides):
        return None
    rank = value(op["input"]).dim()
    gone = {d % rank - rank for d in dims}
    letters = _aligned([value(n).shape for n in sides])
    factors = [_without_inserted(Factor(n, tuple(c))) for n, c in zip(sides, letters)]
    own = [{c for c in f.letters if c is not None} for f in factors]
    if own[0] <= own[1] or own[1] <= own[0] or any(value(op["input"]).dtype != value(n).dtype for n in sides):
        return None  # a sum of elementwise products: an entropy, a norm
    return Contraction(factors[0], factors[1], tuple(f"batch{n}" for n in range(-rank, 0) if n not in gone))


def _without_inserted(side: Factor) -> Factor:
    """The factor before dimensions of size 1 were inserted for the multiplication."""
    while (op := normalize.read(side.node)) is not None:
        rank = len(side.letters)
        if op.name == "unsqueeze":
            inserted = [op["dim"] % rank]
        elif op.name == "getitem" and (places := inserted_places(op["index"], rank)):
            inserted = places
        else:
            break
        if any(side.letters[place] is not None for place in inserted):
            break
        side = Factor(op["input"], tuple(c for n, c in enumerate(side.letters) if n not in inserted))
    return side


def inserted_places(index: Any, rank: int) -> list[int] | None:
    """Places at which ``x[index]``, of ``rank`` dimensions, has a dimension that x has not; None where the index does
    more than that."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(p is None or p is Ellipsis or p == slice(None) for p in parts):
        return None
    if Ellipsis in parts:
        dots = parts.index(Ellipsis)
        parts[dots : dots + 1] = [slice(None)] * (rank - len(parts) + 1)
    return [n for n, p in enumerate(parts) if p is None]


_FORMS: dict[str, Callable[[normalize.Op], Contraction | None]] = {
    **dict.fromkeys(("matmul", "bmm"), lambda op: _batched(op["input"], op["other"])),
    "mm": lambda op: _batched(op["input"], op["other"]),
    "baddbmm": lambda op: _batched(op["batch1"], op["batch2"]),
    "addmm": lambda op: _batched(op["batch1"], op["batch2"]),
    "linear": _linear,
    "inner": _linear,
    "tensordot": _tensordot,
    "einsum": _einsum,
    "sum": _summed,
}

PRODUCTS = tuple(name for name in _FORMS if name != "sum")
"""Names of the operations that are products by themselves."""
