"""Faults of the passes: masks, scales, coverage."""

from __future__ import annotations

from typing import Any

from stem_compile.algebra import masks
from stem_compile.algebra.masks import Causal, Padding
from stem_compile.algebra.symbolic import KV, Q
from stem_compile.passes import pipeline
from stem_compile.passes.graph.sites import AttentionSite, Rejected
from stem_compile.passes.graph.values import value
from stem_compile.reasons import Reason
from tests.testing.plants import Patch, attend, fault, sites, terms


@fault("cached prefix: the causal offset is forgotten", "prefix-invariance")
def _(patch: Patch) -> None:
    terms(patch, lambda t: Causal(0) if isinstance(t, Causal) else t)


@fault("causal mask off by one: every query sees the next token", "block-causality")
def _(patch: Patch) -> None:
    terms(patch, lambda t: Causal(t.offset + 1) if isinstance(t, Causal) else t)


@fault("causal mask off by one: no query sees itself", "dense-equivalence")
def _(patch: Patch) -> None:
    terms(patch, lambda t: Causal(t.offset - 1) if isinstance(t, Causal) else t)


@fault("mask recovery loses the padding conjunct", "dense-equivalence")
def _(patch: Patch) -> None:
    terms(patch, lambda t: masks.Full() if isinstance(t, Padding) else t)


@fault("padding of batch row 0 is used for all rows", "padding-invariance")
def _(patch: Patch) -> None:
    terms(patch, lambda t: Padding(t.index, batched=False) if isinstance(t, Padding) else t)


@fault("padding mask read one key too far", "dense-equivalence")
def _(patch: Patch) -> None:
    attend(patch, tensors=lambda c: [t.roll(1, -1) for t in c["tensors"]])


@fault("positions in floating point are read as exact numbers", "dense-equivalence", model="fractional positions")
def _(patch: Patch) -> None:
    def exact(site: AttentionSite) -> None:
        site.mask, site.tensors = Causal() & masks.predicate(Q - KV <= 25), []

    sites(patch, exact)


@fault("scale forgotten", "dense-equivalence")
def _(patch: Patch) -> None:
    sites(patch, lambda site: setattr(site, "scale", 1.0))


@fault("scale applied twice", "dense-equivalence")
def _(patch: Patch) -> None:
    sites(patch, lambda site: setattr(site, "scale", site.scale**2))


@fault("one attention silently stays dense", "coverage")
def _(patch: Patch) -> None:
    sites(patch, lambda site: Rejected(site.node, Reason.MASK, "planted") if site.index == 1 else None)


@fault("a pass crashes and the graph is left dense", "coverage")
def _(patch: Patch) -> None:
    def crash(*_: Any) -> None:
        raise RuntimeError("planted")

    patch.setattr(pipeline, "insert_selection", crash)


@fault("every length is compiled anew", "shape-robustness")
def _(patch: Patch) -> None:
    sites(patch, lambda site: int(value(site.q).shape[2]) and None)
