"""What a kernel's choice depends on in a device, asked once, and how long runs take there."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton

from stem_compile.kernels import cache
from stem_compile.kernels.contract import Stopwatch
from stem_compile.timing import in_turns

ROUNDS = 7
"""Turns that each run takes in a measurement."""


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """CUDA compute capability; (0, 0) for anything else."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.hip is None else (0, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs that fill a multiprocessor run at a time."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1


@functools.cache
def machine(device: torch.device) -> str:
    """What a measured choice depends on besides its own question: the device, who compiled for it, and what was
    compiled."""
    return (
        f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton {triton.__version__}, templates"
        f" {cache.templates()}"
    )


@functools.cache
def stopwatch(device: torch.device) -> Stopwatch:
    """How ``device`` is measured."""
    return Stopwatch(machine(device), functools.partial(_milliseconds, device))


def _milliseconds(
    device: torch.device, first: Callable[[], object], second: Callable[[], object]
) -> tuple[float, float]:
    """Medians of both, taken in turns. Other work goes before each, as in a model, so that launching does not
    count."""
    with torch.cuda.device(device):
        before = torch.randn(4096, 4096, device=device, dtype=torch.float16)

        def queue() -> None:
            for _ in range(10):
                before @ before

        calls = {"first": first, "second": second}
        times = in_turns(calls, device, turns=ROUNDS, warmup=2, clock="device", queued_before=queue)
        torch.cuda.empty_cache()
    return times["first"].median, times["second"].median
