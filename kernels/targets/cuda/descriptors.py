"""Tensors as the Tensor Memory Accelerator addresses them: which it can, and the descriptors of each kernel's tiles."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from stem_compile.kernels.targets.cuda.configurations import padded


def promises_address(x: torch.Tensor) -> bool:
    """``addressable`` for a fake ``x``, as far as its layout tells. What is symbolic is taken to be whole unless it is
    known not to be, and what has no consecutive rows is copied anyway."""
    unit = 16 // x.element_size()
    if not statically_known_true(x.stride(-1) == 1):
        return True
    broken = [
        statically_known_true(step == 0) or statically_known_true(step % unit != 0)
        for size, step in zip(x.shape[:-1], x.stride())
        if not statically_known_true(size == 1)
    ]
    return not any(broken) and not statically_known_true(x.storage_offset() % unit != 0)


def addressable(x: torch.Tensor) -> bool:
    """Whether TMA can address a real ``x`` [B, H, n, d] with d consecutive: its base and steps are multiples of 16
    bytes, and no dimension is broadcast."""
    unit = 16 // x.element_size()
    return x.data_ptr() % 16 == 0 and all(
        size == 1 or (step % unit == 0 and step > 0) for size, step in zip(x.shape[:-1], x.stride())
    )


def packed_heads(indices: torch.Tensor, counts: torch.Tensor) -> int:
    """Query heads, padded to 2^n, where their lists lie end to end (``selection.packed``), else 0: the kernels'
    PACKED."""
    return 1 << (counts.shape[1] - 1).bit_length() if indices.dim() == 3 else 0


def _strides(x: torch.Tensor) -> list[int]:
    # A dimension of one has any stride; TMA wants a whole one.
    (batch, heads, length, width), (b, h, n, _) = x.shape, x.stride()
    whole = length * padded(width)
    return [b if batch > 1 else whole, h if heads > 1 else whole, n if length > 1 else whole]


REMEMBERED = 1024
"""Shapes whose descriptors are remembered; then all are forgotten."""


def _remembered(describe: Callable[..., Any]) -> Callable[..., Any]:
    """``describe`` (x, *box), whose checks run once a shape: for others like it only the memory differs. Descriptors
    get a ``trait``: what kernels are specialised to (``direct.py``)."""
    known: dict[tuple[Any, ...], tuple[Any, dict[str, Any]]] = {}

    @functools.wraps(describe)
    def described(x: torch.Tensor, *box: int) -> Any:
        key = x.shape, x.stride(), x.dtype, box
        if key not in known or x.data_ptr() % 16:
            descriptor = describe(x, *box)
            if len(known) >= REMEMBERED:
                known.clear()
            # Without the tensor, which would never be freed.
            known[key] = type(descriptor), {name: value for name, value in vars(descriptor).items() if name != "base"}
            descriptor.trait = known[key][1]["trait"] = type(descriptor), x.dtype, tuple(descriptor.block_shape)
            return descriptor
        kind, fields = known[key]
        descriptor = kind.__new__(kind)
        vars(descriptor).update(fields, base=x)
        return descriptor

    return described


@_remembered
def plain(x: torch.Tensor, rows: int) -> Any:
    """Triton descriptor of x [B, H, n, d] in boxes of ``rows`` tokens, d padded to a power of two."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), [*_strides(x), 1], [1, 1, rows, padded(x.shape[-1])])


@_remembered
def boxes(x: torch.Tensor, rows: int, columns: int = 0) -> Any:
    """Gluon descriptor of x [B, H, n, d] in boxes of ``rows`` tokens, and of the whole padded width or ``columns`` of
    it."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    columns = columns or padded(x.shape[-1])
    layout = _box_layout((1, 1, rows, columns), x.dtype)
    return TensorDescriptor(x, list(x.shape), [*_strides(x), 1], [1, 1, rows, columns], layout)


@_remembered
def groups(x: torch.Tensor, stride: int, rows: int, columns: int) -> Any:
    """Triton descriptor of x [B, H, n, d] as [B, H, n / stride, stride, d], one slot of ``rows`` groups a tile."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    batch, heads, length, width = x.shape
    b, h, n, _ = x.stride()
    return TensorDescriptor(
        x, [batch, heads, length // stride, stride, width], [b, h, n * stride, n, 1], [1, 1, rows, 1, columns]
    )


@_remembered
def slots(x: torch.Tensor, stride: int, rows: int, columns: int) -> Any:
    """Gluon descriptor of the whole groups of x [B, H, n, d] as [B, H, stride, n / stride, d]; a tile is one slot of
    ``rows`` groups."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    batch, heads, length, width = x.shape
    b, h, n, _ = x.stride()
    return TensorDescriptor(
        x,
        [batch, heads, stride, length // stride, width],
        [b, h, n, n * stride, 1],
        [1, 1, 1, rows, columns],
        _box_layout((1, 1, 1, rows, columns), x.dtype),
    )


@functools.lru_cache(maxsize=128)
def _box_layout(box: tuple[int, ...], dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    names = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float8_e4m3fn: gl.float8e4nv}
    return gl.NVMMASharedLayout.get_default_for(list(box), names[dtype])
