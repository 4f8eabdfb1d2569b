"""GPU target: chooses a template, its launch configuration, and launches it. Also runs Triton's interpreter on CPU
tensors.

Templates are written for any device Triton compiles to; Hopper has its own (``templates/hopper.py``). Everything stays
on the device: no host synchronisation, no values read back.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from stem_compile import ops, selection
from stem_compile.algebra.blocks import cdiv
from stem_compile.algebra.scores import decode as decode_score
from stem_compile.algebra.symbolic import Q
from stem_compile.kernels import cache
from stem_compile.kernels.spec import DTYPES, KernelSpec, template_of
from stem_compile.kernels.targets.cuda import device, device_selection
from stem_compile.kernels.triton.arguments import arguments

HEAD_DIMS = range(16, 257)
LOG2E = 1.4426950408889634
MARKED_ROWS = 64
"""Query rows that one mark of the Hopper template speaks of."""
SHARE = 64
"""Marks that one program looks through."""
SHARED_BYTES = 227 * 1024
"""Shared memory a Hopper block may use."""

select = device_selection.select


@dataclass(frozen=True)
class Config:
    """Launch configuration: keys a tile, pipeline stages, warps. Portable template: queries a program (0: a whole
    block), TMA."""

    tile: int
    stages: int
    warps: int
    rows: int = 0
    bulk: bool = False


def _padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


@functools.cache
def hopper_config(spec: KernelSpec) -> Config | None:
    """Tile and ring depth of the Hopper template; None where it does not fit."""
    d, dv = _padded(spec.head_dim), _padded(spec.value_dim)
    if (
        spec.dtype == "fp32"
        or spec.block_q not in (64, 128)
        or max(d, dv) > 256
        or spec.head_dim % 8
        or spec.value_dim % 8
        or spec.block_k < 32
    ):
        return None
    tile = 128 if max(d, dv) <= 128 else 64  # several blocks side by side where they are smaller
    # Beside the tiles: barriers, and scratch in which a consumer turns its output into rows.
    free = SHARED_BYTES - 1024 - max(1 << 14, 64 * dv * 2) - spec.block_q * d * 2
    stages = min(4, free // (tile * (d + dv) * 2))
    return Config(tile, stages, 4) if stages >= 2 else None


def shared_bytes(spec: KernelSpec, config: Config) -> int:
    """Shared memory of the portable template, from above: queries, the ring, and for float32 the second part of each
    operand's tf32 split."""
    d, dv = _padded(spec.head_dim), _padded(spec.value_dim)
    if spec.dtype == "fp32":
        return 8 * (config.rows * d + config.tile * (d + dv)) + 4 * (
            config.rows * config.tile + (config.stages - 1) * config.tile * (d + dv)
        )
    return 2 * (config.rows * d + config.rows * config.tile + config.stages * config.tile * (d + dv))


@functools.cache
def portable_configs(spec: KernelSpec) -> tuple[Config, ...]:
    """Configurations of the portable template, best first; later ones need less shared memory."""
    size = 4 if spec.dtype == "fp32" else 2
    row = size * max(_padded(spec.head_dim), _padded(spec.value_dim))
    tile = min(spec.block_k, 128 if row <= 256 else 64 if size == 2 else 32)
    stages = 2 if tile * row >= 1 << 15 else 3
    ladder: list[Config] = []
    rows = spec.block_q
    while not ladder or rows >= 16:
        warps = 8 if rows >= 128 else 4
        ladder += [Config(tile, s, warps, rows, size == 2) for s in range(stages, 0, -1)]
        ladder += [Config(t, s, warps, rows, size == 2) for t in (tile // 2, tile // 4) if t >= 16 for s in (2, 1)]
        rows //= 2
    return tuple(sorted(ladder, key=lambda c: shared_bytes(spec, c) > SHARED_BYTES))


_fitting: dict[tuple[KernelSpec, torch.device, bool], int] = {}


def _launch_portable(
    module: Any,
    chosen: KernelSpec,
    config: Config | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    indices: torch.Tensor,
    counts: torch.Tensor,
    runtime: tuple[Any, ...],
) -> None:
    """Launch with the best configuration that the device's shared memory holds; which one that is, is found once a
    machine."""
    configs = (config,) if config else portable_configs(chosen)
    found = (chosen, q.device, lse is not None)
    key = f"{cache.machine(q.device)} {chosen} {lse is not None}" if q.is_cuda else ""
    if not config and found not in _fitting and (known := cache.recall("fitting", key)) is not None:
        _fitting[found] = int(known)
    start = 0 if config else _fitting.get(found, 0)
    strides = (q.stride()[:3], k.stride()[:3], v.stride()[:3], out.stride()[:3])
    for place in range(start, len(configs)):
        c = configs[place]
        c = replace(c, rows=c.rows or chosen.block_q)
        bulk = c.bulk and device.capability(q.device)[0] >= 9 and _describable(k) and _describable(v)
        keys: tuple[Any, Any] = (_plain_descriptor(k, c.tile), _plain_descriptor(v, c.tile)) if bulk else (k, v)
        blocks, parts = cdiv(q.shape[2], chosen.block_q), chosen.block_q // c.rows
        marks = counts.new_empty(*q.shape[:2], blocks, parts)
        try:
            module.attend[(blocks * parts, q.shape[0] * q.shape[1])](
                marks,
                q,
                *keys,
                out,
                lse,
                indices,
                counts,
                *strides,
                *runtime,
                ROWS=c.rows,
                TILE=c.tile,
                STAGES=c.stages,
                LSE=lse is not None,
                BULK=bulk,
                num_warps=c.warps,
            )
            if module.FIXED.value:
                attend_marked(marks, module, c, q, *keys, out, lse, indices, counts, strides, runtime, bulk)
        except OutOfResources:
            if place + 1 == len(configs):
                raise
            continue
        if not config and _fitting.get(found) != place:
            _fitting[found] = place
            if q.is_cuda:
                cache.store("fitting", key, place)
        return


def attend_marked(
    marks: torch.Tensor,
    module: Any,
    c: Config,
    q: torch.Tensor,
    k: Any,
    v: Any,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    indices: torch.Tensor,
    counts: torch.Tensor,
    strides: Any,
    runtime: tuple[Any, ...],
    bulk: bool,
) -> None:
    """Compute the marked rows of ``out`` and ``lse`` again. marks: int32 [B, H, query blocks, parts of ``c.rows``
    queries]. module: portable."""
    module.attend_marked[(cdiv(marks.numel(), SHARE),)](
        marks,
        marks.numel(),
        q,
        k,
        v,
        out,
        lse,
        indices,
        counts,
        *strides,
        *runtime,
        SHARE=SHARE,
        ROWS=c.rows,
        TILE=c.tile,
        STAGES=c.stages,
        LSE=lse is not None,
        BULK=bulk,
        num_warps=c.warps,
    )


def marked_config(spec: KernelSpec) -> Config:
    """Configuration for rows that the Hopper template marked. Small: it rarely runs, and is never short of
    registers."""
    return Config(
        min(64 if _padded(max(spec.head_dim, spec.value_dim)) <= 128 else 32, spec.block_k),
        2,
        8,
        MARKED_ROWS,
        bulk=True,
    )


def _attention_spec(
    template: str, q: torch.Tensor, v: torch.Tensor, mask: str, spec: str, score: str = ""
) -> KernelSpec:
    return _spec(template, DTYPES[q.dtype], q.shape[-1], v.shape[-1], mask, spec, score)


@functools.lru_cache(maxsize=1024)
def _spec(template: str, dtype: str, head_dim: int, value_dim: int, mask: str, spec: str, score: str) -> KernelSpec:
    chosen = selection.parse(spec)
    return KernelSpec(template, dtype, int(head_dim), int(value_dim), chosen.block_q, chosen.block_k, mask, score=score)


def kernel_name(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: str, spec: str, score: str = "") -> str:
    """Name of the attention kernel for (fake) tensors: Hopper's where the device and the shape allow, else the portable
    one."""
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return ops.REFERENCE
    sink = decode_score(score).sink
    if sink is not None and sink.has(Q):  # the kernels read one logit a head
        return ops.REFERENCE
    hopper = _attention_spec("hopper", q, v, mask, spec, score)
    if device.capability(q.device)[0] == 9 and hopper_config(hopper) is not None:
        return hopper.name
    return replace(hopper, template="portable").name


def select_name(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: str, spec: str) -> str:
    """Name of the fused selection for (fake) tensors."""
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return ops.REFERENCE
    return _attention_spec("select", q, v, mask, spec).name


@functools.lru_cache(maxsize=64)
def _box_layout(rows: int, columns: int, dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for(
        [1, 1, rows, columns], gl.bfloat16 if dtype is torch.bfloat16 else gl.float16
    )


def _plain_descriptor(x: torch.Tensor, rows: int) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    strides = [x.stride(i) if x.shape[i] > 1 else x.shape[-2] * _padded(x.shape[-1]) for i in range(3)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, _padded(x.shape[-1])])


def _describable(x: torch.Tensor) -> bool:
    """Whether TMA can address ``x``: 16-byte aligned base and strides, no broadcast dimension."""
    unit = 16 // x.element_size()
    return x.data_ptr() % 16 == 0 and all(
        size == 1 or (step % unit == 0 and step > 0) for size, step in zip(x.shape[:-1], x.stride())
    )


def _descriptor(x: torch.Tensor, rows: int, columns: int = 0) -> Any:
    """Gluon descriptor of x [B, H, n, d] in boxes of ``rows`` tokens, and of the whole padded width or ``columns`` of
    it."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    width = _padded(x.shape[-1])
    columns = columns or width
    strides = [x.stride(i) if x.shape[i] > 1 else x.shape[-2] * width for i in range(3)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, columns], _box_layout(rows, columns, x.dtype))


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    tensors: Sequence[torch.Tensor],
    scalars: Sequence[int],
    mask: str,
    scale: float,
    spec: str,
    kernel: str,
    lse: torch.Tensor | None = None,
    config: Config | None = None,
    score: str = "",
) -> torch.Tensor:
    """stem::sparse_attention. lse: fp32 [B, H, q_len] to fill, contiguous. config: overrides the measured choice."""
    out = ops.attention_output(q, v)
    batch, heads, q_len = q.shape[:3]
    if not out.numel():
        return out
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if scale <= 0:  # the kernels take a row's maximum before they scale
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    template = template_of(kernel)
    if template == "hopper" and not (_describable(q) and _describable(k) and _describable(v)):
        template = "portable"
    chosen = _attention_spec(template, q, v, mask, spec, score)
    module = cache.load(chosen)
    factor = scale if decode_score(score).modified else scale * LOG2E
    runtime = (
        heads,
        heads // k.shape[1],
        q_len,
        k.shape[2],
        indices.shape[-1],
        factor,
        *arguments(tensors, scalars, mask, score, q.device),
    )
    indices, counts = indices.contiguous(), counts.contiguous()
    rows = cdiv(q_len, chosen.block_q)
    items = rows * batch * heads
    if template == "hopper":
        config = config or hopper_config(chosen)
        assert config is not None, f"no hopper configuration for {chosen}"
        # Uninitialised: the kernel writes every mark, or none is read.
        marks = counts.new_empty(batch, heads, rows, chosen.block_q // MARKED_ROWS)
        # A tile of several blocks comes in boxes as wide as one swizzle.
        box = (
            (chosen.block_k, min(64, _padded(chosen.head_dim), _padded(chosen.value_dim)))
            if chosen.block_k < config.tile
            else (config.tile, 0)
        )
        module.attend[(items,)](
            _descriptor(q, 64),
            _descriptor(k, *box),
            _descriptor(v, *box),
            out,
            lse,
            marks,
            indices,
            counts,
            out.stride()[:3],
            rows,
            *runtime,
            TILE=config.tile,
            STAGES=config.stages,
            LSE=lse is not None,
            num_warps=config.warps,
        )
        if module.FIXED.value:
            again = replace(chosen, template="portable")
            config, strides = marked_config(again), tuple(x.stride()[:3] for x in (q, k, v, out))
            keys = _plain_descriptor(k, config.tile), _plain_descriptor(v, config.tile)
            attend_marked(marks, cache.load(again), config, q, *keys, out, lse, indices, counts, strides, runtime, True)
    else:
        _launch_portable(module, chosen, config, q, k, v, out, lse, indices, counts, runtime)
    return out
