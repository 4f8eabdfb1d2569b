"""``package.module:factory``: a model from a function of the user's, and what it may give."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stem_compile.bench.packages import Mendable


def is_factory(target: str) -> bool:
    """Whether ``target`` means ``package.module:factory``."""
    return ":" in target and not Path(target).exists()


def factory_of(target: str) -> tuple[Callable[..., Any], bool]:
    """The factory of ``package.module:factory``, and whether it asks for a number of tokens. Raises Mendable."""
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise Mendable(f"{target!r}: write package.module:factory")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise Mendable(f"{target}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    factory = getattr(module, name, None)
    if not callable(factory):
        what = (
            f"is a {type(factory).__name__}"
            if hasattr(module, name)
            else f"is not there: module {module_name!r} has no attribute {name!r}"
        )
        raise Mendable(f"{target} {what}; give a function that makes a model")
    parameters = inspect.signature(factory).parameters.values()
    return factory, any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def ready(target: str, made: Any, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """What a factory made, in its place and in evaluation mode. Raises Mendable for what is no module."""
    if not isinstance(made, torch.nn.Module):
        raise Mendable(
            f"{target} gave a {type(made).__name__}: it must give a torch.nn.Module, or a tuple that begins with one"
        )
    return made.to(device, dtype).eval()


def placed(values: Any, device: str, dtype: torch.dtype) -> Any:
    """Tensors of a pytree on ``device``, floating ones in ``dtype``."""

    def move(x: Any) -> Any:
        return x.to(device, dtype if x.is_floating_point() else x.dtype) if isinstance(x, torch.Tensor) else x

    return torch.utils._pytree.tree_map(move, values)
