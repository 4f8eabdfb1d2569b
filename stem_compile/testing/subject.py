"""Subject: a model under test, run in the ways that properties compare: its own, in fp64, and compiled."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from stem_compile import backend
from stem_compile.config import StemConfig
from stem_compile.passes.graph.sites import AttentionSite, Rejected
from stem_compile.reasons import KernelWarning
from stem_compile.selection import BlockSelection, Observed, observe
from stem_compile.testing import numerics
from stem_compile.testing.case import Case, Inputs
from stem_compile.testing.exact import exactly, golden_copy
from stem_compile.testing.inputs import Source, place_of, source_of
from stem_compile.testing.oracle import Oracle
from stem_compile.testing.traced import Traced, primary

SMALL = {
    "budget": 0.5,
    "block_size": 64,
    "key_block_size": 32,
    "sink_blocks": 1,
    "local_blocks": 1,
    "min_length": 0,
    "inner": "eager",
}
"""What a check sets where the user says nothing: blocks small enough that short, quick prompts are sparse."""

LARGE = 20_000_000
"""Models with more parameters get no sinks, so that fewer tokens leave blocks to choose from, few lengths, seeds and
batch sizes, so that properties share
runs and traces, and a limit of time: minutes on a CPU, not hours."""

LOWER = (torch.bfloat16, torch.float16)
"""Dtypes in which a model of fp32 is tried as well."""

Force = Callable[[int, Observed], BlockSelection | None]
"""(number of the attention in this call, what was selected) -> what to compute instead."""


@dataclass(frozen=True)
class Run:
    """One compiled call. output: [batch, length, ...]; selections: in order; attentions: all of the graphs that
    ran."""

    output: torch.Tensor
    selections: list[Observed]
    attentions: list[AttentionSite | Rejected]
    result: Any


def is_large(model: torch.nn.Module) -> bool:
    """Whether the model has more than ``LARGE`` parameters."""
    return sum(p.numel() for p in model.parameters()) > LARGE


def options_of(options: Mapping[str, Any] | StemConfig | None, large: bool = False) -> dict[str, Any]:
    """The options a check runs with: the user's, and ``SMALL`` where they say nothing. Raises OptionError."""
    given = (
        {f: getattr(options, f) for f in options.__dataclass_fields__}
        if isinstance(options, StemConfig)
        else dict(options or {})
    )
    # Key blocks that suit the user's query blocks, not ours.
    small = {
        k: v
        for k, v in (SMALL | ({"sink_blocks": 0} if large else {})).items()
        if not (k == "key_block_size" and "block_size" in given)
        and not (k == "budget" and given.get("coverage") is not None)
    }
    merged = small | given
    StemConfig.from_options(merged)
    return merged


def changed_options(options: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Options with some of them changed; a budget takes the place of a coverage."""
    return {**options, **changes} | ({"coverage": None} if changes.get("budget") is not None else {})


def deployed_options(options: Mapping[str, Any] | StemConfig | None) -> dict[str, Any]:
    """Every option with the value that it has when the user deploys these. Raises OptionError."""
    config = StemConfig.from_options(options)
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def changed(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are not the backend's defaults."""
    defaults = deployed_options(None)
    return {name: value for name, value in options.items() if value != defaults[name]}


def brief(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options without those that ``options_of`` would add again."""
    return {
        k: v
        for k, v in options.items()
        if k not in SMALL or SMALL[k] != v or (k == "key_block_size" and options["block_size"] != SMALL["block_size"])
    }


def _cast(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x.to(dtype) if x.is_floating_point() else x


class Subject:
    """options: the backend's, merged with ``SMALL``, or as they are where as_deployed. large: few examples, whose runs
    properties share. expected: sites that must be rewritten, None for all. text: token
    ids [1, N] for fidelity;
    bounds: the most of each of its measures."""

    def __init__(
        self,
        model: torch.nn.Module,
        make_inputs: Any = None,
        options: Mapping[str, Any] | StemConfig | None = None,
        expected: int | None = None,
        text: torch.Tensor | None = None,
        bounds: Mapping[str, float] | None = None,
        as_deployed: bool = False,
    ) -> None:
        self.model = model.eval()
        self.as_deployed = as_deployed
        self.large = as_deployed or is_large(model)
        self.source: Source = dataclasses.replace(source_of(model, make_inputs), frugal=self.large)
        self.options = deployed_options(options) if as_deployed else options_of(options, self.large)
        self.config = StemConfig.from_options(self.options)
        self.expected, self.text, self.bounds = expected, text, dict(bounds or {})
        self.device, self.dtype = place_of(model)
        self.traced = Traced(model)
        self.oracle = Oracle(self.traced)
        self._compiled: dict[Any, Any] = {}
        self._ran: list[AttentionSite | Rejected] = []
        self._around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        self.inputs = functools.lru_cache(maxsize=64)(self._cached if self.large else self.source.make)
        # Logits of a large model are hundreds of megabytes.
        self.own = functools.lru_cache(maxsize=6 if self.large else 8)(self.run_eager)
        self._kept = functools.lru_cache(maxsize=3)(self.run)
        self.golden_of = functools.lru_cache(maxsize=4 if self.large else 8)(self._golden_of)
        self._twin = functools.cache(lambda: golden_copy(self.model))
        self.lowered = functools.cache(self._lowered)

    @property
    def wide(self) -> bool:
        """Whether tracing is cheap enough to also try embeddings and explicit positions, each a graph of its own."""
        return not self.large

    @property
    def block(self) -> int:
        """Tokens a query block."""
        return self.config.block_size

    @property
    def key_block(self) -> int:
        """Tokens a key block."""
        return self.config.key_block_size or self.config.block_size

    def eager(self, case: Case) -> torch.Tensor:
        """The model's own output, cached; so is ``own``'s."""
        return self.own(self.inputs(case))

    def run_eager(self, given: Inputs) -> torch.Tensor:
        """The model's own output, computed anew."""
        with torch.no_grad():
            return primary(self.model(*given.args, **given.kwargs))

    def _cached(self, case: Case) -> Inputs:
        """What a case makes, with the cache that chunks need, so that they share its graph."""
        inputs = self.source.make(case)
        return (
            dataclasses.replace(inputs, kwargs=inputs.kwargs | {"use_cache": True})
            if "cache" in self.source.can
            else inputs
        )

    def _lowered(self, dtype: torch.dtype) -> Subject:
        """The same model in another dtype, its floating inputs too; made once a dtype."""
        source = dataclasses.replace(self.source, make=lambda case: self.inputs(case).tensors(_cast(dtype)))
        model: Any = copy.deepcopy(self.model).to(dtype)
        if hasattr(model, "set_experts_implementation"):
            # Grouped products of transformers' experts, which half precision takes, have no fp64 to be held against;
            # a loop over the experts breaks the graph, and what stands between graphs cannot be raised to fp64.
            model.set_experts_implementation("batched_mm")
        twin = Subject(model, lambda batch, length, seed: (), self.options)
        twin.source, twin.inputs = source, functools.lru_cache(maxsize=64)(source.make)
        return twin

    def text_inputs(self) -> Inputs:
        """The user's text."""
        assert self.text is not None
        return Inputs((), {"input_ids": self.text.to(self.device), "use_cache": False})

    def golden(self, case: Case) -> torch.Tensor:
        """The model's own output in fp64, cached; so is ``golden_of``'s."""
        return self.golden_of(self.inputs(case))

    def _golden_of(self, given: Inputs) -> torch.Tensor:
        # Inductor need not round between operations, so half-precision positions are no yardstick for it.
        rounds = self.options["inner"] == "eager" or self.dtype == torch.float32
        return primary(exactly(self.model, given.args, given.kwargs, self._twin(), rounds))

    def tolerance(self, case: Case) -> float:
        """Error a position of this case's output may have: see ``numerics``."""
        return numerics.tolerance(self.eager(case), self.golden(case), self.dtype, self.inputs(case).valid)

    def run(self, given: Case | Inputs, force: Force | None = None, **changes: Any) -> Run:
        """The compiled model. changes: options other than the subject's own."""
        inputs = self.inputs(given) if isinstance(given, Case) else given
        options = changed_options(self.options, changes)
        selections: list[Observed] = []
        ran: list[AttentionSite | Rejected] = []

        def note(observed: Observed) -> BlockSelection | None:
            selections.append(observed)
            return force(len(selections) - 1, observed) if force else None

        with observe(note), torch.no_grad():
            result = self._call(options, ran, inputs)
        return Run(primary(result), selections, ran, result)

    @contextlib.contextmanager
    def within(self, around: Callable[[], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
        """Compiled graphs run in ``around()`` inside the ``with``."""
        self._around = around
        try:
            yield
        finally:
            self._around = contextlib.nullcontext

    def run_of(self, case: Case) -> Run:
        """``run`` under the subject's own options, kept where runs are expensive: not for a property that compares two
        of them."""
        return self._kept(case) if self.large else self.run(case)

    def _call(self, options: dict[str, Any], ran: list[AttentionSite | Rejected], inputs: Inputs) -> Any:
        key = tuple(sorted(options.items(), key=lambda kv: kv[0]))
        # What is built outlives this call, so it must not hold this call's list.
        build = functools.partial(self._built, options=options)
        self._ran = ran
        if options["inner"] == "eager":
            return self.traced.run(("stem", key), build, *inputs.args, **inputs.kwargs)
        if key not in self._compiled:
            self._compiled[key] = torch.compile(self.model, backend=build, dynamic=True)
        with torch._dynamo.config.patch(recompile_limit=64):
            return self._compiled[key](*inputs.args, **inputs.kwargs)

    def _built(self, module: fx.GraphModule, examples: list[Any], options: dict[str, Any]) -> Callable[..., Any]:
        """Backend "stem" under ``options``; the result tells which attentions it holds whenever it runs."""
        attentions: list[AttentionSite | Rejected] = []
        with backend.listen(lambda rewrite: attentions.extend(rewrite.attentions)):
            compiled = backend.stem(module, examples, options=options)

        def call(*args: Any) -> Any:
            self._ran.extend(attentions)
            # A kernel that fails is a fault, though dense attention would answer in its place.
            with self._around(), warnings.catch_warnings():
                warnings.simplefilter("error", KernelWarning)
                return compiled(*args)

        return call

    def forget(self) -> None:
        """Rewrite anew at the next call; for tests that plant faults in the passes."""
        self.traced.forget()
        self._compiled.clear()
        self._kept.cache_clear()
        for dtype in LOWER if self.lowered.cache_info().currsize else ():
            self.lowered(dtype).forget()
