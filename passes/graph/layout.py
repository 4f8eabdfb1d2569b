"""Whether anyone can see that a tensor lies in memory another way than it did, and how to lay it out as before.

A sparse attention writes [B, q_len, H, dv] whatever the attention it replaces wrote. As a rule a transpose and a
reshape follow, after which both are the same; a view, an in-place write or the model's caller may see the difference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from stem_compile.passes.graph import memory, normalize
from stem_compile.passes.graph.values import Steps, value

_LAYOUT_QUESTIONS = ("stride", "is_contiguous", "storage_offset", "data_ptr", "as_strided", "untyped_storage", "set_")
"""Operations whose answer is the layout itself."""


def is_layout_visible(node: fx.Node, laid_out: torch.Tensor, writes: memory.Memory) -> bool:
    """Whether what follows in the graph tells ``laid_out``, an example value with the elements of ``node``, from it:
    by strides that reach its end, a view that fails, memory that is shared or written otherwise. writes: memory that is
    written anywhere in the graph."""
    now: dict[fx.Node, Any] = {node: laid_out}
    frontier = [] if same_layout(value(node), laid_out) else [node]
    if frontier and memory.memory(node) & writes:
        return True
    while frontier:
        source = frontier.pop()
        for user in source.users:
            if user.op == "output" or normalize.spelling(user) is None:
                return True
            if normalize.spelling(user) in _LAYOUT_QUESTIONS:
                return True
            result = _again(user, now)
            if result is None:
                return True
            before = value(user)
            shared = [bool(memory.memory(user) & memory.memory(source)), _shares(result, now[source])]
            if shared[0] != shared[1] and memory.memory(user) & writes:
                return True
            if not same_layout(before, result):
                now[user] = result
                frontier.append(user)
    return False


def same_layout(a: Any, b: Any) -> bool:
    """Whether two example values have the same strides where they have more than one element; other things count as the
    same."""
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(same_layout(x, y) for x, y in zip(a, b, strict=True))
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) == isinstance(b, torch.Tensor)
    # As text: comparing symbols would install a guard.
    pairs = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(str(n) == "1" or str(x) == str(y) for n, x, y in pairs)


def layout_steps(have: torch.Tensor, want: torch.Tensor) -> Steps:
    """Method calls that lay ``have`` out in memory as ``want`` is."""
    order = sorted(range(want.dim()), key=lambda d: (-_size(want.stride(d)), -_size(want.shape[d]), d))
    back = tuple(order.index(d) for d in range(want.dim()))
    if order == list(range(want.dim())):
        return (("contiguous", ()),)
    return ("permute", (tuple(order),)), ("contiguous", ()), ("permute", (back,))


def _size(size: Any) -> int:
    """A number for a symbol, without a guard."""
    return size if isinstance(size, int) else int(size.node.hint or 1)


def _again(node: fx.Node, now: dict[fx.Node, Any]) -> Any:
    """Example value of ``node`` from the values of ``now``; None where it raises."""
    arguments: Any = fx.node.map_arg(node.args, lambda n: now.get(n, value(n)))
    keywords: Any = fx.node.map_arg(node.kwargs, lambda n: now.get(n, value(n)))
    tensors = [t for t in now.values() if isinstance(t, torch.Tensor)]
    mode = getattr(tensors[0], "fake_mode", None) if tensors else None
    if mode is None:
        return None
    try:
        with mode, torch.no_grad():
            if node.op == "call_method":
                return getattr(arguments[0], str(node.target))(*arguments[1:], **keywords)
            return node.target(*arguments, **keywords)  # type: ignore[operator]
    except Exception:
        return None


def _shares(a: Any, b: Any) -> bool:
    parts = [x if isinstance(x, tuple | list) else (x,) for x in (a, b)]
    storages = [{t.untyped_storage()._cdata for t in p if isinstance(t, torch.Tensor)} for p in parts]
    return bool(storages[0] & storages[1])
