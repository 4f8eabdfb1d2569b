"""What a device target is. The built-in ones are ``targets/<device type>/target.py``; third parties add one by the
entry point group ``stem_compile.targets`` or by ``TARGETS.register("device type", target)``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from stem_compile.reasons import Reason
from stem_compile.registry import Registry
from stem_compile.selection import Attention, BlockSelection

DEFINITION = "definition"
"""Name of the selection in plain torch (``oam.py``, ``tpd.py``), which any target may choose: its memory grows with the
square of the number of blocks."""


class Kernels(NamedTuple):
    """Names of what runs for an attention: they travel in the graph, users see them, and what is named is what runs."""

    select: str
    attend: str


@dataclass(frozen=True)
class Stopwatch:
    """How a device is measured. machine: text of all that a measurement depends on beside the attention itself (device,
    compiler, templates). milliseconds: medians of runs that take turns; raises torch.OutOfMemoryError where one of them
    does."""

    machine: str
    milliseconds: Callable[[Callable[[], object], Callable[[], object]], tuple[float, float]]


@runtime_checkable
class Target(Protocol):
    """Kernels of one device type. ``supports`` and ``kernels`` are asked at compile time, with fake tensors; ``select``
    and ``attend`` get real ones."""

    def supports(self, attention: Attention, /) -> Reason | None:
        """Why the attention cannot be computed here; None where it can."""
        ...

    def kernels(self, attention: Attention, /) -> Kernels:
        """Names of the kernels for an attention that is supported, given back to ``select`` and ``attend``."""
        ...

    def select(self, attention: Attention, kernel: str, /) -> tuple[torch.Tensor, torch.Tensor]:
        """(indices, counts) of ``BlockSelection``, shaped as ``ops.selection_shape`` says."""
        ...

    def attend(self, attention: Attention, selection: BlockSelection, kernel: str, /) -> torch.Tensor:
        """Softmax attention over the visible keys of the selected blocks, in memory of ``ops.attention_output``; a row
        without any gives 0."""
        ...

    def stopwatch(self, device: torch.device, /) -> Stopwatch | None:
        """How to measure from which length on selecting pays; None where that is not measured."""
        ...


TARGETS: Registry[Target] = Registry(
    "target",
    Target,
    folder=Path(__file__).parent / "targets",
    package="stem_compile.kernels.targets",
    group="stem_compile.targets",
    layout="{}/target.py",
)
