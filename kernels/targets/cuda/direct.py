"""Launching kernels at little cost to the host.

Triton's own launch asks of every argument anew what the kernel is to be specialised to, which takes tens of
microseconds a kernel: as long as a short prompt's attention. Here the answer is remembered by what it depends on, the
types of the arguments, whether pointers and numbers are multiples of 16, and constants; the kernel that Triton compiled
for it is launched as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.compiler import CompiledKernel

REMEMBERED = 4096
"""Kernels remembered; then all are forgotten, and asked for again."""

_compiled: dict[tuple[Any, ...], tuple[CompiledKernel, tuple[Any, ...]]] = {}


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``. args: the leading parameters, in order; constants: launch options and the
    rest of the parameters, all of them compile-time constants. Raises what Triton does."""
    traits = [_trait(x) for x in args]
    key = kernel, torch.cuda.current_device() if torch.cuda.is_available() else -1, *traits, *constants.items()
    known = _compiled.get(key)
    if known is not None:
        compiled, values = known
        compiled[(*grid, 1, 1)[:3]](*args, *values)
        return
    compiled = kernel[grid](*args, **constants)
    if isinstance(compiled, CompiledKernel):  # not under the interpreter
        if len(_compiled) >= REMEMBERED:
            _compiled.clear()
        names = kernel.arg_names[len(args) :]
        _compiled[key] = compiled, tuple(constants[name] for name in names)


def _trait(x: Any) -> Any:
    """What of an argument a kernel is specialised to."""
    kind = type(x)
    if kind is torch.Tensor or isinstance(x, torch.Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if kind is int:
        # One, multiples of 16, and numbers beyond 32 bits.
        return 1 if x == 1 else (x % 16 == 0, -(1 << 31) <= x < 1 << 31, x < 1 << 63)
    if kind is tuple or kind is list or isinstance(x, tuple):
        return (kind, *(_trait(y) for y in x))
    if x is None or kind is bool:
        return x
    if hasattr(x, "block_shape"):  # a tensor descriptor, whose layout follows from these
        return kind, x.base.dtype, tuple(x.block_shape)
    return kind
