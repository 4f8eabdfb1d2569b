"""Find every attention of a graph. The graph is untouched; each find is an ``AttentionSite`` or a ``Rejected`` with a typed reason.

A pattern is a file in ``patterns/`` with ``match(node)``; files are found by name and tried in alphabetical order. What holds for every
attention, whatever its spelling, is checked here: shapes, dtypes, gradients, and K/V that were repeated for grouped queries.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

import torch
from torch import fx

from stem_compile.kernels import launch
from stem_compile.passes.trace_back import peel, unrepeated
from stem_compile.sites import AttentionSite, Reason, Rejected, View, value

DECODE_QUERIES = 16
"""Fewer query rows than this behind a prefix are decoding, where selection has nothing to save."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def patterns() -> tuple[ModuleType, ...]:
    """Every pattern module, by name."""
    folder = Path(__file__).with_name("patterns")
    return tuple(importlib.import_module(f"stem_compile.passes.patterns.{m.name}") for m in pkgutil.iter_modules([str(folder)]))


def match(graph: fx.Graph) -> list[AttentionSite | Rejected]:
    """Attentions of ``graph`` in execution order."""
    found: list[AttentionSite | Rejected] = []
    for node in graph.nodes:
        for pattern in patterns():
            hit = pattern.match(node)
            if hit is not None:
                found.append(_checked(hit))
                break
    for index, hit in enumerate(found):
        if isinstance(hit, AttentionSite):
            hit.index = index
    return found


def _checked(hit: AttentionSite | Rejected) -> AttentionSite | Rejected:
    if isinstance(hit, Rejected):
        return hit
    hit.q, hit.k, hit.v = (_peeled(x, hit.node) for x in (hit.q, hit.k, hit.v))
    tensors = [value(n) for n in (hit.q, hit.k, hit.v)]
    if not all(isinstance(t, torch.Tensor) and t.dim() == 4 for t in tensors):
        return Rejected(hit.node, Reason.SHAPE, "q, k, v are not 4-D: " + ", ".join(str(tuple(getattr(t, "shape", ()))) for t in tensors))
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return Rejected(hit.node, Reason.GRADIENT)
    q, k, v = tensors
    if not (q.dtype == k.dtype == v.dtype and q.dtype in DTYPES):
        return Rejected(hit.node, Reason.DTYPE, ", ".join(str(t.dtype).removeprefix("torch.") for t in tensors))
    # int() of a symbolic size specialises it: nobody serves one model with several head counts or head dims.
    allowed = launch.head_dims(q.device.type)
    if int(q.shape[-1]) not in allowed or int(v.shape[-1]) not in allowed:
        return Rejected(hit.node, Reason.HEAD_DIM, f"{q.shape[-1]} and {v.shape[-1]}, {q.device.type} takes {allowed.start} to {allowed.stop - 1}")
    repeated = hit.k, hit.v
    hit.k, hit.v = (_unrepeated(x, hit.node) for x in (hit.k, hit.v))
    if value(hit.k).shape[1] != value(hit.v).shape[1]:
        hit.k, hit.v = repeated
    q, k, v = value(hit.q), value(hit.k), value(hit.v)
    if int(q.shape[1]) % int(k.shape[1]):
        return Rejected(hit.node, Reason.SHAPE, f"{q.shape[1]} query heads over {k.shape[1]} key heads")
    # Comparing symbolic sizes installs guards: a cache's keys and values have lengths that Dynamo does not know to be equal.
    if not (q.shape[0] == k.shape[0] == v.shape[0] and q.shape[-1] == k.shape[-1] and k.shape[2] == v.shape[2]):
        return Rejected(hit.node, Reason.SHAPE, f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}")
    if q.shape[2] != k.shape[2] and q.shape[2] < DECODE_QUERIES:
        return Rejected(hit.node, Reason.DECODE, f"{q.shape[2]} queries, {k.shape[2]} keys")
    return hit


def _unrepeated(x: fx.Node | View, site: fx.Node) -> fx.Node | View:
    return x if isinstance(x, View) else unrepeated(x, site)


def _peeled(x: fx.Node | View, site: fx.Node) -> fx.Node | View:
    """A view without steps is its node."""
    found = peel(x, site) if isinstance(x, View) else x
    return found.node if isinstance(found, View) and not found.steps else found
