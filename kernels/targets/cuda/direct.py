"""Launching kernels at little cost to the host.

Triton's own launch asks of every argument anew what the kernel is to be specialised to, which takes tens of
microseconds a kernel: together as long as a short prompt's attention. Here the answer is remembered by all that it
depends on, and the kernel that Triton compiled for it is launched as it is.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

REMEMBERED = 4096
"""Launches remembered; then all are forgotten, and asked for again."""

_compiled: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``. args: the leading parameters, in order; constants: launch options and the
    rest of the parameters, all of them compile-time constants. Raises what Triton does."""
    if not isinstance(kernel, JITFunction):  # the interpreter's
        kernel[grid](*args, **constants)
        return
    traits = [
        x if (kind := type(x)) is int else (x.dtype, x.data_ptr() & 15) if kind is torch.Tensor else _trait(x)
        for x in args
    ]
    device = triton.runtime.driver.active.get_current_device()
    key = kernel, device, *traits, *constants.items()
    known = _compiled.get(key)
    if known is not None:
        compiled, values = known
        compiled[(*grid, 1, 1)[:3]](*args, *values)
        return
    compiled = kernel[grid](*args, **constants)
    if isinstance(compiled, CompiledKernel):
        if len(_compiled) >= REMEMBERED:
            _compiled.clear()
        names = kernel.arg_names[len(args) :]
        _compiled[key] = compiled, tuple(constants[name] for name in names)


def _trait(x: Any) -> Any:
    """What of an argument a kernel is specialised to: type and alignment of tensors, which numbers, that something is a
    float. A tensor descriptor knows its own."""
    if isinstance(x, torch.Tensor):
        return x.dtype, x.data_ptr() & 15
    if isinstance(x, tuple):
        return x if not x or type(x[0]) is int else tuple(_trait(y) for y in x)
    kind = type(x)
    return kind if kind is float else getattr(x, "trait", x)
