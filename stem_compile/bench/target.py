"""TARGET of the command line: a model, inputs for it and its tokenizer, from a transformers id, a folder, a GGUF file
or ``package.module:factory``. Every command takes the same targets through ``load``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from stem_compile.bench.checkpoint import Checkpoint
from stem_compile.bench.factory import Factory, first_line, is_factory
from stem_compile.packages import UserError
from stem_compile.testing.case import Case
from stem_compile.testing.inputs import NoInputs, Source, source_of

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one call."""


@dataclass(frozen=True)
class Target:
    """A model in evaluation mode and what its commands need.

    inputs: number of tokens -> arguments of one prefill of batch size 1. make_inputs: the same as ``check_model``
    takes it; None derives inputs from the model. longest: tokens that the model has positions for. checkpoint: where
    the weights are from; None for a factory's model.
    """

    name: str
    model: torch.nn.Module
    inputs: Callable[[int], Arguments]
    make_inputs: Any = None
    longest: int = 1 << 20
    checkpoint: Checkpoint | None = None

    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises UserError where there is none."""
        if self.checkpoint is None:
            raise UserError(f"{self.name}: text needs a tokenizer, which a factory does not give; leave --text out")
        return self.checkpoint.tokenizer()

    def explain_failure(self, tokens: int, error: BaseException) -> UserError | None:
        """The UserError that says so where the model itself, uncompiled, fails on ``tokens`` tokens too; else None."""
        try:
            args, kwargs = self.inputs(tokens)
            with torch.inference_mode():
                self.model(*args, **kwargs)
        except UserError as failure:
            return failure
        except Exception as failure:
            limit = f" (it has positions for {self.longest:,})" if tokens > self.longest else ""
            return UserError(
                f"{self.name}: the model itself raises {type(failure).__name__} at {tokens:,} tokens{limit}:"
                f" {first_line(failure)}"
            )
        return None


def load(target: str, device: str, dtype: torch.dtype) -> Target:
    """What ``target`` names. Raises UserError with one line that says what is wrong."""
    if is_factory(target):
        return _from_factory(target, device, dtype)
    checkpoint = Checkpoint.find(target)
    model = checkpoint.model(device, dtype)
    return _derived(target, model, None, checkpoint)


def _derived(target: str, model: torch.nn.Module, make_inputs: Any, checkpoint: Checkpoint | None) -> Target:
    """A target whose inputs have any length: from its config, its signature, an example batch or a function."""
    try:
        source = source_of(model, make_inputs)
    except NoInputs as error:
        raise UserError(
            f"{target}: {first_line(error)}; or let the factory take a number of tokens and return (model, args)"
        ) from None
    if source.strategy is not None:
        raise UserError(f"{target}: inputs drawn by a Hypothesis strategy serve check_model only; give a function")

    def inputs(tokens: int) -> Arguments:
        given = source.make(Case(length=tokens))
        return given.args, given.kwargs | _prefill_arguments(model, source, make_inputs)

    return Target(target, model, inputs, make_inputs, source.longest, checkpoint)


def _prefill_arguments(model: torch.nn.Module, source: Source, make_inputs: Any) -> dict[str, Any]:
    """What a language model of transformers is called with to prefill: its cache, and the logits of the last token."""
    if make_inputs is not None or "cache" not in source.can:
        return {}
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"use_cache": True} | ({"logits_to_keep": 1} if keeps else {})


def _from_factory(target: str, device: str, dtype: torch.dtype) -> Target:
    """factory() gives a model, or (model, inputs) with a function (batch, length, seed) or an example batch;
    factory(tokens) gives (model, args) or (model, args, kwargs) for prompts of that length."""
    factory = Factory.of(target)
    product = factory(device, dtype)
    derived = _derived(target, product.model, product.inputs, None)
    if not factory.takes_tokens or product.inputs is None:
        return derived

    def inputs(tokens: int) -> Arguments:
        # The model of the first call is kept: only the inputs of this one are.
        example = factory(device, dtype, tokens).inputs
        given = source_of(product.model, lambda batch, length, seed: example).make(Case(length=tokens))
        return given.args, given.kwargs

    return Target(target, product.model, inputs, product.inputs, derived.longest)
