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
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import ShortenTraceback

from stem_compile import running
from stem_compile.config import OptionError, StemConfig
from stem_compile.passes import pipeline
from stem_compile.passes.distribute import NotDistributed
from stem_compile.passes.graph.values import module_path
from stem_compile.passes.pipeline import Numbers, Rewrite
from stem_compile.passes.pipeline import copied_module as copied
from stem_compile.reasons import Reason, StemWarning

log = logging.getLogger("stem_compile")

_listeners: list[Callable[[Rewrite], None]] = []

BENIGN = (Reason.DENSE_LAYER, Reason.FUEL, Reason.SHORT, Reason.SLOWER, Reason.DECODE)
"""Rejections that ``fallback="error"`` lets pass: the user or the length asked for them."""


CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes whose memory belongs to CUDA graphs: nothing of a run may be kept there."""


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
    owner = _owner()
    model = running.Model() if owner is None else running.model_of(owner)
    place = running.Place.of(module, example_inputs, model)
    numbered = config.fuel is not None or bool(config.dense_layers)
    untouched = copied(module) if numbered else None
    try:
        result = rewrite(module, config, model.numbers(place.key))
    except NotDistributed as error:
        raise StemError(f"context_parallel: {error}") from None
    graph = model.compiled(place, result)
    model.counted(place.key, graph.sites)
    for listener in _listeners:
        listener(result)
    _refuse(result, config)
    _report(graph, model, module, config)
    compiled: Callable[..., Any] = _inner(module, example_inputs, config.inner, config.mode)
    if untouched is not None:
        compiled = _by_number(compiled, untouched, config, model, place, graph)
    if not callable(getattr(compiled, "serialize_compile_artifacts", None)):
        compiled = running.watched(compiled, graph, owner, keeps=config.mode not in CUDA_GRAPHS)
    return compiled


def _reset() -> None:
    """What Dynamo calls when it forgets everything."""
    running.forget()


stem.reset = _reset  # type: ignore[attr-defined]


def _owner() -> object | None:
    """What ``torch.compile`` made for the call that this compilation belongs to; None where the backend was called by
    hand."""
    frame = sys._getframe(2)
    caller = frame.f_locals.get("self")
    return caller if type(caller).__name__ == "_TorchCompileWrapper" else None


def _refuse(result: Rewrite, config: StemConfig) -> None:
    if config.context_parallel is not None and result.rejected:
        hit = result.rejected[0]
        raise StemError(f"context_parallel: {module_path(hit.node)} cannot be computed over all ranks: {hit.words}")
    refused = [hit for hit in result.rejected if hit.reason not in BENIGN]
    if config.fallback == "error" and refused:
        raise StemError(
            "not rewritten, and fallback='error':\n" + "\n".join(f"  {module_path(r.node)}: {r.words}" for r in refused)
        )


def _report(graph: running.Graph, model: running.Model, module: fx.GraphModule, config: StemConfig) -> None:
    """One line for the log about a compiled graph, and one warning where a model's long prompt stays dense as a whole.

    A model is judged where a frame of it ends: a graph that ends in a graph break may be followed by one that is
    rewritten.
    """
    log.info("%s", running.line(graph))
    reason = getattr(module, "compile_subgraph_reason", None)
    if model.warned or config.when_dense == "silent" or getattr(reason, "graph_break", False):
        return
    try:
        told = model.dense(max(config.shortest, running.LONG))
    except Exception:
        # A policy that fails has cost its attentions already.
        log.debug("nothing can be said about a dense prompt", exc_info=True)
        return
    if told is None:
        return
    model.warned = True
    if config.when_dense == "error":
        raise StemError(f"{told} (when_dense='error')")
    warnings.warn(f"{told} Option when_dense='silent' turns this off, 'error' raises.", StemWarning, stacklevel=3)


def _by_number(
    compiled: Callable[..., Any],
    untouched: fx.GraphModule,
    config: StemConfig,
    model: running.Model,
    place: running.Place,
    graph: running.Graph,
) -> Callable[..., Any]:
    """A graph that layers share, which runs as ``dense_layers`` and ``fuel`` ask for the layer it is called for."""
    count, start = len(graph.sites), model.numbers(place.key)
    # Dynamo may run the graph for another compiled model of the same class too.
    homes = {place.key: model}
    variants = {config.asks(start.first, start.used, count): (compiled, graph.sites)}

    def run(*args: Any) -> Any:
        key = place.key_of(args, model)
        if key not in homes:
            homes[key] = running.model_that_runs() or model
        numbers = homes[key].numbers(key)
        asked = config.asks(numbers.first, numbers.used, count)
        if asked not in variants:
            variant = copied(untouched)
            sites = [running.Site.of(hit) for hit in pipeline.rewrite(variant, config, numbers).attentions]
            inner = variant.forward if config.inner == "eager" else torch.compile(variant, backend=config.inner)
            variants[asked] = inner, sites
        runnable, graph.sites = variants[asked]
        homes[key].counted(key, graph.sites)
        result = runnable(*args)
        graph.layers[key] = graph.sites, graph.last
        return result

    return run


def rewrite(module: fx.GraphModule, config: StemConfig, numbers: Numbers | None = None) -> Rewrite:
    """Run the passes on ``module`` in place. What they fail on stays as it was, with one warning. Raises
    NotDistributed, under ``context_parallel``, and nothing else."""
    result = pipeline.rewrite(module, config, numbers)
    broken = [hit for hit in result.rejected if hit.reason is Reason.INTERNAL]
    if broken:
        places = ", ".join(sorted({module_path(hit.node) for hit in broken}))
        warnings.warn(
            f"backend 'stem' left {len(broken)} of {len(result.attentions)} attentions dense ({places}):"
            f" {broken[0].detail}."
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
