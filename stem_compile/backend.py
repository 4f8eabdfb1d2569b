"""``torch.compile(model, backend="stem")``: run the pipeline on Dynamo's graph and hand the result to the inner
backend.

An exception in a backend makes Dynamo split the graph and try again in ever smaller pieces, so a bug of ours would show
as slowness. Hence: wrong options raise at once through Dynamo, and a failure of the pipeline leaves the graph as it
came, with one warning that says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import ShortenTraceback

from stem_compile.config import OptionError, StemConfig
from stem_compile.passes import pipeline
from stem_compile.passes.graph.sites import Rejected
from stem_compile.passes.graph.values import module_path
from stem_compile.passes.pipeline import Rewrite
from stem_compile.reasons import Reason, StemWarning

log = logging.getLogger(__name__)

_listeners: list[Callable[[Rewrite], None]] = []

BENIGN = (Reason.DENSE_LAYER, Reason.FUEL, Reason.SHORT, Reason.SLOWER, Reason.DECODE)
"""Rejections that ``fallback="error"`` lets pass: the user or the length asked for them."""


class StemError(ShortenTraceback, ValueError):
    """A wrong option, or under ``fallback="error"`` an attention that was not rewritten. Dynamo passes it on as
    it is."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


def stem(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | StemConfig | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Dynamo backend. options: fields of ``StemConfig``; mode: Inductor's, where no options are given."""
    try:
        config = StemConfig.from_options(options)
        config = dataclasses.replace(config, mode=mode) if mode is not None else config
    except OptionError as error:
        raise StemError(str(error)) from None
    result = rewrite(module, config)
    for listener in _listeners:
        listener(result)
    refused = [hit for hit in result.found if isinstance(hit, Rejected) and hit.reason not in BENIGN]
    if config.fallback == "error" and refused:
        raise StemError(
            "not rewritten, and fallback='error':\n" + "\n".join(f"  {module_path(r.node)}: {r.words}" for r in refused)
        )
    compiled: Callable[..., Any] = _inner(module, example_inputs, config.inner, config.mode)
    return compiled


def rewrite(module: fx.GraphModule, config: StemConfig) -> Rewrite:
    """Run the passes on ``module`` in place. What they fail on stays as it was, with one warning; it never raises."""
    result = pipeline.rewrite(module, config)
    broken = [hit for hit in result.rejected if hit.reason is Reason.INTERNAL]
    if broken:
        places = ", ".join(sorted({module_path(hit.node) for hit in broken}))
        warnings.warn(
            f"backend 'stem' left {len(broken)} of {len(result.found)} attentions dense ({places}): {broken[0].detail}."
            " Set TORCH_LOGS=+stem_compile for the traceback.",
            StemWarning,
            stacklevel=2,
        )
    return result


@contextlib.contextmanager
def listen(callback: Callable[[Rewrite], None]) -> Iterator[None]:
    """Call ``callback`` with every graph that the backend rewrites inside the ``with``."""
    _listeners.append(callback)
    try:
        yield
    finally:
        _listeners.remove(callback)


def _inner(module: fx.GraphModule, example_inputs: Sequence[Any], name: str, mode: str | None) -> Any:
    if name == "eager":
        return module.forward
    if name == "inductor":
        from torch._inductor.compile_fx import compile_fx

        patches = torch._inductor.list_mode_options(mode) if mode not in (None, "default") else None
        return compile_fx(module, list(example_inputs), config_patches=patches)
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(name)(module, list(example_inputs))
