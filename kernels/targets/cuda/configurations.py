"""Launch configurations: tiles, pipeline stages, warps, and what of them a device's shared memory holds."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from stem_compile.kernels.spec import KernelSpec

MARKED_ROWS = 64
"""Query rows that one mark of the Hopper template speaks of."""
SHARED_BYTES = 227 * 1024
"""Shared memory a Hopper block may use."""

CELLS: dict[str, Any] = {"ROWS": 128, "COLUMNS": 128, "STEP": 64, "STAGES": 4, "BAND": 16, "num_warps": 8}
"""Cell scores where tiles come by TMA. Tiles of 128 x 256 are faster and were wrong under triton 3.6 (they spill)."""
PEAKS: dict[str, Any] = {"CONSUMERS": 3, "COLUMNS": 256, "STEP": 64, "STAGES": 3, "num_warps": 4}
RAGGED_PEAKS: dict[str, Any] = {"CONSUMERS": 2, "COLUMNS": 256, "STEP": 64, "STAGES": 4, "num_warps": 4}
"""Cell scores on Hopper; where some block is cut short, counting a cell's pairs needs the registers of fewer
consumers."""


@dataclass(frozen=True)
class Config:
    """Launch configuration: keys a tile, pipeline stages, warps. Portable template: queries a program (0: a whole
    block), TMA."""

    tile: int
    stages: int
    warps: int
    rows: int = 0
    bulk: bool = False


@functools.cache
def padded(dim: int) -> int:
    """The power of two, 16 or more, that a head dim is padded to in registers and tiles."""
    return max(16, 1 << (dim - 1).bit_length())


@functools.cache
def hopper_config(kernel_spec: KernelSpec) -> Config | None:
    """Tile and ring depth of the Hopper template; None where it does not fit."""
    d, dv = padded(kernel_spec.head_dim), padded(kernel_spec.value_dim)
    if (
        kernel_spec.dtype == "fp32"
        or kernel_spec.block_q not in (64, 128)
        or max(d, dv) > 256
        or kernel_spec.head_dim % 8
        or kernel_spec.value_dim % 8
        or kernel_spec.block_k < 32
    ):
        return None
    tile = 128 if max(d, dv) <= 128 else 64  # several blocks side by side where they are smaller
    # Beside the tiles: barriers, and scratch in which a consumer turns its output into rows.
    free = SHARED_BYTES - 1024 - max(1 << 14, 64 * dv * 2) - kernel_spec.block_q * d * 2
    stages = min(4, free // (tile * (d + dv) * 2))
    return Config(tile, stages, 4) if stages >= 2 else None


def shared_bytes(kernel_spec: KernelSpec, config: Config) -> int:
    """Shared memory of the portable template, from above: queries, the ring, and for float32 the second part of each
    operand's tf32 split."""
    d, dv = padded(kernel_spec.head_dim), padded(kernel_spec.value_dim)
    if kernel_spec.dtype == "fp32":
        return 8 * (config.rows * d + config.tile * (d + dv)) + 4 * (
            config.rows * config.tile + (config.stages - 1) * config.tile * (d + dv)
        )
    return 2 * (config.rows * d + config.rows * config.tile + config.stages * config.tile * (d + dv))


@functools.cache
def portable_configs(kernel_spec: KernelSpec) -> tuple[Config, ...]:
    """Configurations of the portable template, best first; later ones need less shared memory."""
    size = 4 if kernel_spec.dtype == "fp32" else 2
    row = size * max(padded(kernel_spec.head_dim), padded(kernel_spec.value_dim))
    tile = min(kernel_spec.block_k, 128 if row <= 256 else 64 if size == 2 else 32)
    stages = 2 if tile * row >= 1 << 15 else 3
    ladder: list[Config] = []
    rows = kernel_spec.block_q
    while not ladder or rows >= 16:
        warps = 8 if rows >= 128 else 4
        ladder += [Config(tile, s, warps, rows, size == 2) for s in range(stages, 0, -1)]
        ladder += [Config(t, s, warps, rows, size == 2) for t in (tile // 2, tile // 4) if t >= 16 for s in (2, 1)]
        rows //= 2
    return tuple(sorted(ladder, key=lambda c: shared_bytes(kernel_spec, c) > SHARED_BYTES))


def marked_config(kernel_spec: KernelSpec) -> Config:
    """Configuration for rows that the Hopper template marked. Small: it rarely runs, and is never short of
    registers."""
    tile = min(64 if padded(max(kernel_spec.head_dim, kernel_spec.value_dim)) <= 128 else 32, kernel_spec.block_k)
    return Config(tile, 2, 8, MARKED_ROWS, bulk=True)


def pair_tile(row_bytes: int) -> int:
    """Groups of queries, and of keys, in a tile of the scores of single pairs. row_bytes: of one padded q or k."""
    return 64 if row_bytes <= 512 else 32


def cell_config(element_size: int, bulk: bool) -> dict[str, Any]:
    """Launch configuration of the portable cell scores. bulk: tiles come by TMA."""
    if bulk:
        return {**CELLS, "BULK": True}
    tile, inner = (128, 64) if element_size == 2 else (64, 32)
    return {"ROWS": tile, "COLUMNS": tile, "STEP": inner, "STAGES": 3, "BULK": False, "BAND": 1, "num_warps": 8}
