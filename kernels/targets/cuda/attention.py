"""Launching block-sparse attention: the Hopper template, the portable one, and rows that either marked for a second
run."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from triton.runtime.errors import OutOfResources

from stem_compile import ops
from stem_compile.algebra.blocks import cdiv
from stem_compile.kernels import cache
from stem_compile.kernels.spec import DTYPES, KernelSpec, template_of
from stem_compile.kernels.targets.cuda import descriptors, device, direct
from stem_compile.kernels.targets.cuda.configurations import (
    MARKED_ROWS,
    Config,
    hopper_config,
    marked_config,
    padded,
    portable_configs,
)
from stem_compile.kernels.triton.arguments import arguments
from stem_compile.selection import Attention, BlockSelection, parse

LOG2E = 1.4426950408889634
SHARE = 64
"""Marks that one program looks through."""


def attention_spec(template: str, attention: Attention) -> KernelSpec:
    """What the attention's generated module depends on."""
    texts = attention.mask_text, attention.spec_text, attention.score_text
    return _spec(template, DTYPES[attention.q.dtype], *attention.widths, *texts)


@functools.lru_cache(maxsize=1024)
def _spec(
    template: str, dtype: str, head_dim: int, value_dim: int, mask: str, spec_text: str, score: str
) -> KernelSpec:
    parsed = parse(spec_text)
    return KernelSpec(template, dtype, head_dim, value_dim, parsed.block_q, parsed.block_k, mask, score=score)


class Launch(NamedTuple):
    """What every attention kernel takes, in its order: queries, keys and values as they are given to it, the result,
    the lists, and what a kernel knows only at run time. lse: fp32 [B, H, q_len] to fill, contiguous, or None."""

    kernel_spec: KernelSpec
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor | None
    indices: torch.Tensor
    counts: torch.Tensor
    runtime: tuple[Any, ...]

    @property
    def strides(self) -> tuple[tuple[int, ...], ...]:
        """Strides of q, k, v and the result, but for their last dimension."""
        return tuple(x.stride()[:3] for x in (self.q, self.k, self.v, self.out))

    @property
    def rows(self) -> int:
        """Query blocks."""
        return int(cdiv(self.q.shape[2], self.kernel_spec.block_q))


def attend(
    attention: Attention, selection: BlockSelection, kernel: str, lse: torch.Tensor | None = None
) -> torch.Tensor:
    """stem::sparse_attention by the template that ``kernel`` names. lse: as in ``Launch``."""
    out = ops.attention_output(attention.q, attention.v)
    if not out.numel():
        return out
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (attention.q, attention.k, attention.v))
    scale = attention.scale
    if scale <= 0:  # the kernels take a row's maximum before they scale
        q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
    template = template_of(kernel)
    if template == "hopper":
        # The kernel was chosen for the strides that the graph promised; memory from elsewhere may lie otherwise.
        q, k, v = (
            x if descriptors.addressable(x) else x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)
        )
    runtime = (
        q.shape[1],
        attention.group,
        q.shape[2],
        k.shape[2],
        selection.indices.shape[-1] // (q.shape[1] if selection.indices.dim() == 3 else 1),
        scale if attention.score.modified else scale * LOG2E,
        *arguments(attention.tensors, attention.scalars, attention.mask_text, attention.score_text, q.device),
    )
    indices, counts = selection.indices.contiguous(), selection.counts.contiguous()
    launch = Launch(attention_spec(template, attention), q, k, v, out, lse, indices, counts, runtime)
    if template == "hopper":
        _launch_hopper(launch)
    else:
        _launch_portable(launch)
    return out


def _launch_hopper(launch: Launch) -> None:
    kernel_spec, q, k, v, counts = launch.kernel_spec, launch.q, launch.k, launch.v, launch.counts
    config = hopper_config(kernel_spec)
    assert config is not None, f"no hopper configuration for {kernel_spec}"
    batch, heads = q.shape[:2]
    # Uninitialised: the kernel writes every mark, or none is read.
    marks = counts.new_empty(batch, heads, launch.rows, kernel_spec.block_q // MARKED_ROWS)
    # A tile of several blocks comes in boxes as wide as one swizzle.
    side_by_side = kernel_spec.block_k < config.tile
    box = (
        (kernel_spec.block_k, min(64, padded(kernel_spec.head_dim), padded(kernel_spec.value_dim)))
        if side_by_side
        else (config.tile, 0)
    )
    module: Any = cache.load(kernel_spec)
    direct.launch(
        module.attend,
        (launch.rows * batch * heads,),
        descriptors.boxes(q, 64),
        descriptors.boxes(k, *box),
        descriptors.boxes(v, *box),
        launch.out,
        launch.lse,
        marks,
        launch.indices,
        counts,
        launch.out.stride()[:3],
        launch.rows,
        *launch.runtime,
        TILE=config.tile,
        STAGES=config.stages,
        LSE=launch.lse is not None,
        PACKED=descriptors.packed_heads(launch.indices, counts),
        num_warps=config.warps,
    )
    if module.FIXED.value:
        again = _as_portable(kernel_spec)
        attend_marked(marks, again, Tiles(launch, marked_config(again), bulk=True))


@functools.lru_cache(maxsize=1024)
def _as_portable(kernel_spec: KernelSpec) -> KernelSpec:
    return replace(kernel_spec, template="portable")


class Tiles:
    """What the two kernels of the portable template take, in their order, and by name. bulk: keys and values come by
    TMA."""

    def __init__(self, launch: Launch, config: Config, bulk: bool) -> None:
        keys = [descriptors.plain(x, config.tile) if bulk else x for x in (launch.k, launch.v)]
        lists = launch.indices, launch.counts
        self.operands = launch.q, *keys, launch.out, launch.lse, *lists, *launch.strides, *launch.runtime
        self.constants = {
            "ROWS": config.rows,
            "TILE": config.tile,
            "STAGES": config.stages,
            "LSE": launch.lse is not None,
            "BULK": bulk,
            "PACKED": descriptors.packed_heads(launch.indices, launch.counts),
            "num_warps": config.warps,
        }


_fitting: dict[tuple[KernelSpec, torch.device, bool], int] = {}


def _launch_portable(launch: Launch) -> None:
    """Launch with the best configuration that the device's shared memory holds; which one that is, is found once a
    machine."""
    kernel_spec, q, k, v = launch.kernel_spec, launch.q, launch.k, launch.v
    configs = portable_configs(kernel_spec)
    question = (kernel_spec, q.device, launch.lse is not None)
    key = f"{device.machine(q.device)} {kernel_spec} {launch.lse is not None}" if q.is_cuda else ""
    if question not in _fitting and (known := cache.recall("fitting", key)) is not None:
        _fitting[question] = int(known)
    bulk = device.capability(q.device)[0] >= 9 and descriptors.addressable(k) and descriptors.addressable(v)
    for place in range(_fitting.get(question, 0), len(configs)):
        try:
            _portable(launch, configs[place], bulk and configs[place].bulk)
        except OutOfResources:
            if place + 1 == len(configs):
                raise
            continue
        if _fitting.get(question) != place:
            _fitting[question] = place
            if q.is_cuda:
                cache.store("fitting", key, place)
        return


def _portable(launch: Launch, config: Config, bulk: bool) -> None:
    q, parts = launch.q, launch.kernel_spec.block_q // config.rows
    marks = launch.counts.new_empty(*q.shape[:2], launch.rows, parts)
    module: Any = cache.load(launch.kernel_spec)
    tiles = Tiles(launch, config, bulk)
    direct.launch(
        module.attend, (launch.rows * parts, q.shape[0] * q.shape[1]), marks, *tiles.operands, **tiles.constants
    )
    if module.FIXED.value:
        attend_marked(marks, launch.kernel_spec, tiles)


def attend_marked(marks: torch.Tensor, kernel_spec: KernelSpec, tiles: Tiles) -> None:
    """Compute the marked rows of the result and of ``lse`` again. marks: int32 [B, H, query blocks, parts of ``ROWS``
    queries]. kernel_spec: of the portable template."""
    module: Any = cache.load(kernel_spec)
    direct.launch(
        module.attend_marked,
        (cdiv(marks.numel(), SHARE),),
        marks,
        marks.numel(),
        *tiles.operands,
        SHARE=SHARE,
        **tiles.constants,
    )
