"""The golden run: a model in fp64, also where its code asks for fp32 (norms, softmax, rotary embeddings)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

LOW = (torch.float32, torch.bfloat16, torch.float16)


class Exact(TorchFunctionMode):
    """Inside the ``with``, whatever would be computed in a lower precision is computed in fp64."""

    _METHODS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in self._METHODS:
            return args[0].double()
        kwargs = {k: _raised(v) for k, v in (kwargs or {}).items()}
        result = function(*(_raised(a) for a in args), **kwargs)
        # A factory without a dtype makes the default one.
        return result.double() if isinstance(result, torch.Tensor) and result.dtype in LOW else result


def _raised(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument in LOW else argument


def doubled(tree: Any) -> Any:
    """Floating tensors of a pytree in fp64."""
    return tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, tree)


def golden_copy(model: torch.nn.Module) -> torch.nn.Module:
    """The same weights in fp64, in evaluation mode."""
    twin: Any = copy.deepcopy(model).double().eval()
    if hasattr(twin, "set_experts_implementation"):
        # Grouped products of transformers' experts have no fp64.
        twin.set_experts_implementation("eager")
    return twin  # type: ignore[no-any-return]
