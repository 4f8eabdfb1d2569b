"""What a kernel's choice depends on in a device, asked once."""

from __future__ import annotations

import functools

import torch


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """CUDA compute capability; (0, 0) for anything else."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and torch.version.hip is None else (0, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs that fill a multiprocessor run at a time."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 1
