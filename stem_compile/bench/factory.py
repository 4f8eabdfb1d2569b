"""``package.module:factory``: a model from a function of the user's, and what it may give."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stem_compile.packages import UserError

EXAMPLE_TOKENS = 256
"""Length that a factory is first asked for; where another length is wanted it is asked again."""


def is_factory(target: str) -> bool:
    """Whether ``target`` means ``package.module:factory``."""
    return ":" in target and not Path(target).exists()


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@dataclass(frozen=True)
class Product:
    """What a factory returned. model: in evaluation mode on its device. inputs: a function (batch, length, seed) ->
    inputs, an example batch, or None where it returned a model alone."""

    model: torch.nn.Module
    inputs: Any


@dataclass(frozen=True)
class Factory:
    """A user's function. takes_tokens: it is asked for a number of tokens."""

    target: str
    function: Callable[..., Any]
    takes_tokens: bool

    @classmethod
    def of(cls, target: str) -> Factory:
        """The function that ``package.module:factory`` names. Raises UserError."""
        module_name, _, name = target.partition(":")
        if not module_name or not name:
            raise UserError(f"{target!r}: write package.module:factory")
        sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise UserError(f"{target}: {first_line(error)}") from error
        except Exception as error:
            raise UserError(
                f"{target}: importing {module_name} raised {type(error).__name__}: {first_line(error)}"
            ) from error
        finally:
            sys.path.remove(os.getcwd())
        function = getattr(module, name, None)
        if not callable(function):
            what = (
                f"is a {type(function).__name__}"
                if hasattr(module, name)
                else f"is not there: module {module_name!r} has no attribute {name!r}"
            )
            raise UserError(f"{target} {what}; give a function that makes a model")
        required = _required(function)
        if len(required) > 1:
            raise UserError(
                f"{target} needs {len(required)} arguments ({', '.join(required)}): a factory takes none, or a number"
                " of tokens"
            )
        return cls(target, function, bool(required))

    def __call__(self, device: str, dtype: torch.dtype, tokens: int = EXAMPLE_TOKENS) -> Product:
        """Call the function. Raises UserError where it fails or returns something else than a model and inputs."""
        try:
            value = self.function(tokens) if self.takes_tokens else self.function()
        except Exception as error:
            asked = f"({tokens})" if self.takes_tokens else "()"
            raise UserError(f"{self.target}{asked} raised {type(error).__name__}: {first_line(error)}") from error
        model, *inputs = value if isinstance(value, tuple) and value else (value,)
        if not isinstance(model, torch.nn.Module):
            raise UserError(
                f"{self.target} gave a {type(model).__name__}: it must give a torch.nn.Module, or a tuple that begins"
                " with one"
            )
        given = tuple(inputs) if len(inputs) > 1 else inputs[0] if inputs else None
        return Product(model.to(device, dtype).eval(), _placed(given, device, dtype))


def _required(function: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def _placed(values: Any, device: str, dtype: torch.dtype) -> Any:
    """Tensors of a pytree, or of what a function returns, on ``device``; floating ones in ``dtype``."""
    if callable(values) and not isinstance(values, torch.Tensor) and not hasattr(values, "example"):
        return functools.wraps(values)(lambda *args: _placed(values(*args), device, dtype))

    def move(x: Any) -> Any:
        return x.to(device, dtype if x.is_floating_point() else x.dtype) if isinstance(x, torch.Tensor) else x

    return torch.utils._pytree.tree_map(move, values)
