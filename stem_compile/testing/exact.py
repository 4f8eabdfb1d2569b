"""The golden run: a model in fp64, also where its code asks for fp32 (norms, softmax, rotary embeddings), at the
positions that the model itself computes.

What a model computes from positions alone (masks, biases by distance, rotary tables) is part of what it means: a
window of fractional or half-precision positions ends where rounding puts it, and fp64 would put it elsewhere. So the
model is first run in its own dtype and recorded, and the golden run takes from there every value that does not depend
on parameters or floating inputs. Only the arithmetic on data is exact.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves, tree_map

LOW = (torch.float32, torch.bfloat16, torch.float16)


class Positions:
    """Values that a run computes from positions alone, in the order in which its calls compute them."""

    def __init__(self) -> None:
        self._values: list[tuple[str, torch.Tensor | None]] = []
        self._next = 0
        self._follows = True

    def recorded(self, name: str, value: torch.Tensor | None) -> None:
        """Keep ``value``; None for a call whose result depends on data."""
        self._values.append((name, None if value is None else value.clone()))

    def rewind(self) -> None:
        """Play from the beginning."""
        self._next, self._follows = 0, True

    def played(self, name: str, result: torch.Tensor) -> None:
        """Put the recorded value into ``result``, in place so that views of it follow."""
        if not self._follows or self._next >= len(self._values):
            return
        recorded, value = self._values[self._next]
        self._next += 1
        if recorded != name:
            # The model takes another way in fp64: from here on its own values are all there is.
            self._follows = False
        elif value is not None and value.shape == result.shape and not _overlaps(result):
            result.copy_(value)


def _overlaps(x: torch.Tensor) -> bool:
    return any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))


class _Traced(TorchFunctionMode):
    """Follows which tensors depend on data: parameters, floating inputs, and whatever is computed from them."""

    def __init__(self, positions: Positions | None, data: Iterable[torch.Tensor], plays: bool) -> None:
        super().__init__()
        self._positions, self._plays, self._data = positions, plays, list(data)
        for tensor in self._data:
            tensor._stem_data = True  # type: ignore[attr-defined]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        # Parameters are their owner's.
        for tensor in self._data:
            if hasattr(tensor, "_stem_data"):
                del tensor._stem_data

    def _call(self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        return function(*args, **kwargs)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = self._call(function, args, kwargs or {})
        if self._positions is None:
            return result
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        data = any(hasattr(x, "_stem_data") for x in given)
        written = args[0] if function is torch.Tensor.__setitem__ else None
        for leaf in [written] if written is not None else tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._follow(function, leaf, given, data)
        return result

    def _follow(self, function: Any, leaf: torch.Tensor, given: Sequence[torch.Tensor], data: bool) -> None:
        assert self._positions is not None
        if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in (leaf, *given)):
            # Inside vmap a value is one of many and has no memory of its own.
            return
        name = resolve_name(function) or str(function)
        if data:
            leaf._stem_data = True  # type: ignore[attr-defined]
        # A view of what was recorded follows it.
        same = any(x is not leaf and _shares(x, leaf) for x in given)
        if self._plays:
            if data or same:
                self._positions.played(name, torch.empty(0))
            else:
                self._positions.played(name, leaf)
        else:
            self._positions.recorded(name, None if data or same else leaf)


def _shares(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.device == b.device and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class Recorded(_Traced):
    """Inside the ``with``, ``positions`` records what does not depend on ``data``."""

    def __init__(self, positions: Positions, data: Iterable[torch.Tensor]) -> None:
        super().__init__(positions, data, plays=False)


class Exact(_Traced):
    """Inside the ``with``, whatever would be computed in a lower precision is computed in fp64. positions: what a
    recorded run computed from positions alone, taken as it was; data: parameters and inputs of this run."""

    _METHODS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)

    def __init__(self, positions: Positions | None = None, data: Iterable[torch.Tensor] = ()) -> None:
        super().__init__(positions, data, plays=True)

    def _call(self, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if function in self._METHODS:
            return args[0].double()
        kwargs = {k: _raised(v) for k, v in kwargs.items()}
        result = function(*(_raised(a) for a in args), **kwargs)
        # A factory without a dtype makes the default one.
        return result.double() if isinstance(result, torch.Tensor) and result.dtype in LOW else result


def _raised(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in LOW else argument


def doubled(tree: Any) -> Any:
    """Floating tensors of a pytree in fp64."""
    return tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, tree)


def floating(tree: Any) -> list[torch.Tensor]:
    """Floating tensors of a pytree."""
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor) and x.is_floating_point()]


def golden_copy(model: torch.nn.Module) -> torch.nn.Module:
    """The same weights in fp64, in evaluation mode."""
    twin: Any = copy.deepcopy(model).double().eval()
    if hasattr(twin, "set_experts_implementation"):
        # Grouped products of transformers' experts have no fp64.
        twin.set_experts_implementation("eager")
    return twin  # type: ignore[no-any-return]


def exactly(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    twin: torch.nn.Module | None = None,
    own_positions: bool = True,
) -> Any:
    """``model(*args, **kwargs)`` in fp64. twin: its ``golden_copy``, where one is at hand. own_positions: at the
    positions that the model computes in its own dtype; else those are exact too."""
    if not own_positions:
        twin = golden_copy(model) if twin is None else twin
        raised = doubled((tuple(args), dict(kwargs)))
        with torch.no_grad(), Exact():
            return twin(*raised[0], **raised[1])
    positions = Positions()
    mine = tree_map(_alias, (tuple(args), dict(kwargs)))
    with torch.no_grad(), Recorded(positions, [*model.parameters(), *floating(mine)]):
        model(*mine[0], **mine[1])
    twin = golden_copy(model) if twin is None else twin
    positions.rewind()
    theirs = doubled((tuple(args), dict(kwargs)))
    with torch.no_grad(), Exact(positions, [*twin.parameters(), *floating(theirs)]):
        return twin(*theirs[0], **theirs[1])


def _alias(x: Any) -> Any:
    """The same tensor as an object of its own, so that marks do not outlive the run."""
    return x.detach() if isinstance(x, torch.Tensor) else x
