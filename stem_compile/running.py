"""What runs: the graphs that the backend compiled for each compiled model, their attentions, and how often they ran.

``torch.compile`` makes one object for each call of it; that object is the model here. Attentions are numbered over the
model: a frame that Dynamo shares between layers is told apart by the parameters it is called with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from stem_compile.passes.graph.sites import AttentionSite, Rejected
from stem_compile.passes.graph.values import module_path, value
from stem_compile.passes.pipeline import Numbers, Rewrite
from stem_compile.reasons import Reason
from stem_compile.selection import BlockSelection, Observed, observe

Size = int | str
"""A size, or the name of a symbolic one."""


@dataclass
class Site:
    """One attention of a model, as it was compiled. ``site["reason"]`` gives what ``to_dict`` does.

    name: where in the model. decision: "rewritten" or "rejected". reason: why not. detail: reason, what decided and the
    remedy in one line. mask: mask and score in words. density: share of the visible block pairs computed in the last
    run, None where it is not known; head_densities: the same of each query head. kernel: what computes it. q_shape,
    k_shape, v_shape: [B, heads, length, head dim], symbolic sizes as text. keys: length of a rejected attention as it
    was compiled, where its node tells.
    """

    name: str
    decision: str
    reason: Reason | None = None
    detail: str = ""
    mask: str | None = None
    density: float | None = None
    head_densities: tuple[float, ...] = ()
    kernel: str | None = None
    q_shape: tuple[Size, ...] | None = None
    k_shape: tuple[Size, ...] | None = None
    v_shape: tuple[Size, ...] | None = None
    keys: int | None = None

    @classmethod
    def of(cls, hit: AttentionSite | Rejected) -> Site:
        """What the passes did with an attention."""
        if isinstance(hit, Rejected):
            return cls(module_path(hit.node), "rejected", hit.reason, hit.words, keys=_keys(hit))
        shapes = (tuple(n if isinstance(n, int) else str(n) for n in value(x).shape) for x in (hit.q, hit.k, hit.v))
        q, k, v = shapes
        return cls(hit.name, "rewritten", mask=hit.words, kernel=hit.kernel, q_shape=q, k_shape=k, v_shape=v)

    def to_dict(self) -> dict[str, Any]:
        """{"name", "decision", "reason", "mask", "density", "density_of_heads", "kernel", "q_shape", "k_shape",
        "v_shape"}; the reason's name in small letters; of the heads' densities the least, the mean and the most."""
        heads = self.head_densities
        reason = None if self.reason is None else self.reason.name.lower()
        return {
            "name": self.name,
            "decision": self.decision,
            "reason": reason,
            "mask": self.mask,
            "density": self.density,
            "density_of_heads": (min(heads), sum(heads) / len(heads), max(heads)) if heads else None,
            "kernel": self.kernel,
            "q_shape": self.q_shape,
            "k_shape": self.k_shape,
            "v_shape": self.v_shape,
        }

    def __getitem__(self, name: str) -> Any:
        return self.to_dict()[name]


def _keys(hit: Rejected) -> int | None:
    """Longest size among what an attention is computed from: its keys, as a rule."""
    shapes = [value(n).shape for n in (hit.node, *hit.node.all_input_nodes) if isinstance(value(n), torch.Tensor)]
    sizes = [n if isinstance(n, int) else n.node.hint for shape in shapes for n in shape[-2:]]
    return max((n for n in sizes if n is not None), default=None)


@dataclass
class Graph:
    """One compiled graph. frame: number of the frame that it is a part of, the same when it is compiled anew; calls:
    how often it ran; last: selections of its last run, in order."""

    sites: list[Site]
    frame: str = ""
    calls: int = 0
    last: list[Selected] = field(default_factory=list)
    layers: dict[Any, tuple[list[Site], list[Selected]]] = field(default_factory=dict)

    @property
    def rewritten(self) -> list[Site]:
        """The attentions that run as sparse ones."""
        return [site for site in self.sites if site.decision == "rewritten"]

    def measured(self) -> list[Site]:
        """The sites with the densities of the last run."""
        return _measured(self.sites, self.last)

    def of_layers(self) -> list[Site]:
        """The sites of every layer that the graph runs for, as far as they differ, with densities."""
        return [site for layer in self.layers.values() for site in _measured(*layer)] or self.measured()


LONG = 64
"""Keys from which a prompt that stays dense is worth a word, whatever ``min_length`` says."""
ASKED_FOR = (Reason.DENSE_LAYER, Reason.FUEL, Reason.SHORT, Reason.SLOWER)
"""What the user or the length asked for."""
DECODE_ONLY = (
    "backend 'stem' saw decode steps only: the prompt was prefilled before, uncompiled. Compile the model's forward"
    " (model.forward = torch.compile(model.forward, backend='stem')), which generate() calls for prefill too; its"
    " compile_config compiles decoding alone, and takes options= only with mode=None."
)


def line(graph: Graph) -> str:
    """What was done with a graph's attentions, in one line."""
    if not graph.sites:
        return f"graph {graph.frame}: no attention"
    refused = [f"{site.name}: {site.detail}" for site in graph.sites if site.decision == "rejected"]
    why = "; ".join(refused[:4]) + (f"; and {len(refused) - 4} more" if len(refused) > 4 else "")
    done = f"graph {graph.frame}: {len(graph.rewritten)} of {len(graph.sites)} attentions rewritten"
    return done + (f"; {why}" if why else "")


def _measured(sites: list[Site], selections: list[Selected]) -> list[Site]:
    measured = [dataclasses.replace(site) for site in sites]
    rewritten = [site for site in measured if site.decision == "rewritten"]
    if len(rewritten) == len(selections):
        for site, selected in zip(rewritten, selections, strict=True):
            site.density, site.head_densities = selected.density, selected.head_densities
    return measured


KEPT = 1 << 22
"""Elements of block lists and mask tensors that are kept of a run, to tell its density when asked."""


@dataclass
class Selected:
    """A selection of a run that can still be asked for its density."""

    selection: BlockSelection | None
    candidates: Callable[[], torch.Tensor] | None

    @classmethod
    def of(cls, observed: Observed) -> Selected:
        """What is small enough to keep of a selection: neither queries nor keys."""
        attention = observed.attention
        held = [observed.selection.indices, *attention.tensors]
        if sum(t.numel() for t in held) > KEPT:
            return cls(None, None)
        mask, block_q, block_k = attention.mask, observed.selection.block_q, observed.selection.block_k
        return cls(observed.selection, lambda: mask.candidates(block_q, block_k))

    @property
    def density(self) -> float | None:
        """Computed over visible block pairs; None where the lists were too large to keep."""
        if self.selection is None or self.candidates is None:
            return None
        return self.selection.density(self.candidates())

    @property
    def head_densities(self) -> tuple[float, ...]:
        """``density`` of each query head; none where it is not known."""
        if self.selection is None or self.candidates is None:
            return ()
        return self.selection.head_densities(self.candidates())


@dataclass(frozen=True)
class Place:
    """Where a graph is in its model. frame: number of its frame. parameters: places of the inputs that are parameters,
    which tell the layers apart that share a frame. key: name of the layer's attentions."""

    frame: str
    recompilation: str
    parameters: tuple[int, ...]
    key: tuple[Any, ...]

    @staticmethod
    def of(module: fx.GraphModule, inputs: Sequence[Any], model: Model) -> Place:
        """The place of a graph that is being compiled."""
        compile_id = torch._guards.CompileContext.current_compile_id()
        frame, _, recompilation = str(compile_id or f"{len(model.graphs)}/0").rpartition("/")
        recompilation = recompilation.partition("_")[0]
        places = tuple(n for n, x in enumerate(inputs) if isinstance(x, torch.nn.Parameter))
        own = tuple(map(id, module.parameters()))
        place = Place(frame, recompilation, places, ())
        return Place(frame, recompilation, places, own or place.key_of(inputs, model))

    def key_of(self, inputs: Sequence[Any], model: Model) -> tuple[Any, ...]:
        """Name of the layer that the graph is called for. A graph without parameters goes with the last that had
        some."""
        if self.key and not self.parameters:
            return self.key
        own = tuple(id(inputs[n]) for n in self.parameters)
        if own:
            model.context = own
        return (self.frame, *(own or model.context))


@dataclass
class Model:
    """One call of ``torch.compile``. graphs: what was compiled for it, in order. warned: whether its user was told that
    nothing is sparse."""

    graphs: list[Graph] = field(default_factory=list)
    warned: bool = False
    _numbers: dict[Any, Numbers] = field(default_factory=dict)
    _next: Numbers = field(default_factory=Numbers)
    context: tuple[int, ...] = ()

    @property
    def sites(self) -> list[Site]:
        """Attentions of all graphs."""
        return [site for graph in self.graphs for site in graph.sites]

    @property
    def recompilations(self) -> int:
        """Graphs that were compiled for a frame that had one already."""
        return sum(n - 1 for n in Counter(graph.frame for graph in self.graphs).values())

    def compiled(self, place: Place, result: Rewrite) -> Graph:
        """Enter a graph that was compiled."""
        if place.recompilation == "0" and any(graph.frame == place.frame for graph in self.graphs):
            # Dynamo was reset and counts anew.
            self.graphs.clear()
        self.graphs.append(Graph([Site.of(hit) for hit in result.attentions], place.frame))
        return self.graphs[-1]

    def dense(self, long: int) -> str | None:
        """Why a prompt of at least ``long`` keys runs dense as a whole, and the change that helps most; None where
        something is rewritten, nothing is long, or it was asked for."""
        sites = self.sites
        if any(site.decision == "rewritten" for site in sites):
            return None
        refused = [site for site in sites if site.reason not in ASKED_FOR and (site.keys is None or site.keys >= long)]
        if not refused:
            return None
        reasons = Counter(site.reason for site in refused if site.reason is not None)
        if set(reasons) == {Reason.DECODE}:
            prefilled = any(site.reason in (Reason.SHORT, Reason.SLOWER) for site in sites)
            return None if prefilled else DECODE_ONLY
        # A failure of ours was told by itself.
        if set(reasons) <= {Reason.DECODE, Reason.INTERNAL}:
            return None
        reasons.pop(Reason.DECODE, None)
        (reason, count), *_ = reasons.most_common(1)
        site = next(site for site in refused if site.reason is reason)
        return (
            f"backend 'stem' rewrote none of {len(sites)} attentions, {count} of them (first {site.name}) because"
            f" {site.detail or reason.value}."
        )

    def numbers(self, key: Any) -> Numbers:
        """Where the graph called ``key`` begins; the end of what is known for a new one."""
        return self._numbers.get(key, self._next)

    def counted(self, key: Any, sites: Sequence[Site]) -> None:
        """Note that the graph called ``key`` holds these attentions."""
        if key in self._numbers:
            return
        start = self._numbers[key] = self._next
        spent = sum(site.reason in (None, Reason.FUEL) for site in sites)
        self._next = Numbers(start.first + len(sites), start.used + spent)


_models: dict[int, Model] = {}
_latest: list[weakref.ReferenceType[object] | None] = [None]


def model_of(owner: object) -> Model:
    """The model of what ``torch.compile`` made; a new one for an owner that is not known."""
    if id(owner) not in _models:
        _models[id(owner)] = Model()
        weakref.finalize(owner, _models.pop, id(owner), None)
    return _models[id(owner)]


def known(owner: object | None) -> Model | None:
    """The model of an owner, None for one that nothing was compiled for."""
    return None if owner is None else _models.get(id(owner))


def owner_of(callback: object) -> object | None:
    """What ``torch.compile`` made for a call: the innermost of the backends that Dynamo wraps into one another."""
    while (inner := getattr(callback, "_torchdynamo_orig_backend", None)) is not None:
        callback = inner
    return callback if type(callback).__name__ == "_TorchCompileWrapper" else None


def model_that_runs() -> Model | None:
    """The model whose compiled call is the innermost on the stack; None outside of any. Walks the stack."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith("eval_frame.py"):
            owner = owner_of(frame.f_locals.get("callback"))
            if owner is not None:
                return model_of(owner)
        frame = frame.f_back  # type: ignore[assignment]
    return None


def latest() -> Model | None:
    """The model that ran last, where it is still there."""
    reference = _latest[0]
    return known(reference()) if reference is not None else None


def forget() -> None:
    """Forget all models: Dynamo was reset."""
    _models.clear()
    _latest[0] = None


class _Current(threading.local):
    graph: Graph | None = None


_current = _Current()
_run_listeners: list[Callable[[Graph], None]] = []


@contextlib.contextmanager
def listen_to_runs(callback: Callable[[Graph], None]) -> Iterator[None]:
    """Call ``callback`` at the end of every run of a compiled graph inside the ``with``."""
    _run_listeners.append(callback)
    try:
        yield
    finally:
        _run_listeners.remove(callback)


def _noted(observed: Observed) -> None:
    if _current.graph is not None:
        _current.graph.last.append(Selected.of(observed))


_watch = observe(_noted)
_watch.__enter__()


def watched(compiled: Callable[..., Any], graph: Graph, owner: object | None, keeps: bool) -> Callable[..., Any]:
    """``compiled``, counting its runs. keeps: whether block lists may outlive a run, which CUDA graphs do not allow."""
    reference = None if owner is None else weakref.ref(owner)

    def run(*args: Any) -> Any:
        outer = _current.graph
        graph.calls += 1
        graph.last = []
        _current.graph = graph if keeps else None
        _latest[0] = reference
        try:
            return compiled(*args)
        finally:
            _current.graph = outer
            for callback in _run_listeners:
                callback(graph)

    # What Inductor hangs on its functions, above all how to serialise them, is the wrapper's too.
    return functools.update_wrapper(run, compiled, assigned=())
