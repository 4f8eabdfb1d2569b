"""Where faults are planted: in what the passes decide, in what the CPU target is called with, in what it gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from stem_compile import selection
from stem_compile.algebra.masks import And, Mask
from stem_compile.kernels.targets.cpu import target as cpu
from stem_compile.passes import pipeline
from stem_compile.passes.graph.sites import AttentionSite
from stem_compile.selection import Attention, BlockSelection

Patch = pytest.MonkeyPatch
Call = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """name: the mistake in words. caught_by: name of a property. plant: makes it, with pytest's monkeypatch.
    model: name of the model in ``models.SUBJECTS`` that it is planted under."""

    name: str
    caught_by: str
    plant: Callable[[Patch], None]
    model: str = "llama"

    @contextmanager
    def planted(self) -> Iterator[None]:
        """The fault is there inside the ``with``."""
        with pytest.MonkeyPatch.context() as patch:
            self.plant(patch)
            yield


FAULTS: list[Fault] = []


def fault(name: str, caught_by: str, model: str = "llama") -> Callable[[Callable[[Patch], None]], None]:
    """Enter the decorated plant into ``FAULTS``."""
    return lambda plant: FAULTS.append(Fault(name, caught_by, plant, model))


# -- where faults are planted
# ----------------------------------------------------------------------------------------------


def _call(attention: Attention, lists: BlockSelection | None = None) -> Call:
    """What a kernel is called with, by name."""
    a = attention
    texts = {"mask": a.mask_text, "spec": a.spec_text, "score": a.score_text}
    call = {"q": a.q, "k": a.k, "v": a.v, "tensors": a.tensors, "scalars": a.scalars, "scale": a.scale, **texts}
    return call if lists is None else {**call, "indices": lists.indices, "counts": lists.counts}


def _changed(call: Call, changes: dict[str, Callable[[Call], Any]]) -> Attention:
    c = call | {name: change(call) for name, change in changes.items()}
    return Attention(c["q"], c["k"], c["v"], c["mask"], c["scale"], c["spec"], c["score"], c["tensors"], c["scalars"])


def sites(patch: Patch, change: Callable[[AttentionSite], Any]) -> None:
    """Change every attention after its mask was understood and compared; a result replaces it."""
    compare = pipeline.compare

    def wrong(attentions: Any) -> Any:
        return [(change(hit) or hit) if isinstance(hit, AttentionSite) else hit for hit in compare(attentions)]

    patch.setattr(pipeline, "compare", wrong)


def terms(patch: Patch, change: Callable[[Mask], Mask]) -> None:
    """Change every term of every recovered mask."""

    def wrong(site: AttentionSite) -> None:
        assert site.mask is not None
        changed = [change(t) for t in (site.mask.terms if isinstance(site.mask, And) else (site.mask,))]
        site.mask = changed[0]
        for term in changed[1:]:
            site.mask = site.mask & term

    sites(patch, wrong)


def attend(patch: Patch, **changes: Callable[[Call], Any]) -> None:
    """The attention kernel gets other arguments than it was called with."""
    right = cpu.attend

    def wrong(attention: Attention, lists: BlockSelection, kernel: str) -> torch.Tensor:
        call = _call(attention, lists)
        others = {name: change(call) for name, change in changes.items() if name in ("indices", "counts")}
        return right(_changed(call, changes), dataclasses.replace(lists, **others), kernel)

    patch.setattr(cpu, "attend", wrong)


def select(patch: Patch, **changes: Callable[[Call], Any]) -> None:
    """So does the selection."""
    right = cpu.select
    patch.setattr(cpu, "select", lambda attention, kernel: right(_changed(_call(attention), changes), kernel))


def output(patch: Patch, change: Callable[[Call, torch.Tensor], torch.Tensor]) -> None:
    """Change what the attention kernel wrote."""
    right = cpu.attend
    patch.setattr(
        cpu,
        "attend",
        lambda attention, lists, kernel: change(_call(attention, lists), right(attention, lists, kernel)),
    )


def lists(
    patch: Patch, change: Callable[[Call, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Change the block lists that were made."""
    right = cpu.select
    patch.setattr(cpu, "select", lambda attention, kernel: change(_call(attention), *right(attention, kernel)))


def plain(patch: Patch, weights: Callable[[torch.Tensor, torch.Tensor, Call], torch.Tensor]) -> None:
    """A kernel of ten lines in the target's place. weights: (scores, blocks computed [B, H, rows, columns], call) ->
    what multiplies the values."""

    def kernel(attention: Attention, lists: BlockSelection, kernel: str) -> torch.Tensor:
        dense = lists.dense(attention.candidates)
        keys, values = (x.repeat_interleave(attention.group, 1) for x in (attention.k, attention.v))
        hidden = ~(expanded(dense, attention.spec, attention.shape) & attention.mask.dense())
        scores = (attention.q @ keys.transpose(-1, -2) * attention.scale).masked_fill(hidden, -torch.inf)
        return weights(scores, dense, _call(attention, lists)) @ values

    patch.setattr(cpu, "attend", kernel)


def expanded(dense: torch.Tensor, spec: selection.SelectionSpec, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Blocks as tokens."""
    return dense.repeat_interleave(spec.block_q, 2)[:, :, : shape[2]].repeat_interleave(spec.block_k, 3)[
        ..., : shape[3]
    ]


def respecified(**changes: Any) -> Callable[[Call], str]:
    """The selection's spec with other fields."""
    return lambda call: dataclasses.replace(selection.parse(call["spec"]), **changes).text()
