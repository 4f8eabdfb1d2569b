"""Implementations of the ``stem::`` operators: the plain-torch definitions, or the target of the tensors' device.

A target is a module ``kernels/targets/<device type>/target.py`` with

``HEAD_DIMS``   range of the head dims it has kernels for
``kernel_name(q, k, v, mask, spec, score) -> str``   attention kernel for (fake) tensors; ``ops.REFERENCE`` when it has
none for them
``select_name(q, k, v, mask, spec) -> str``   the same for the fused selection; it is asked for scores that block scores
need not see
``select(q, k, v, tensors, scalars, mask, scale, spec, kernel) -> (indices, counts)``   shapes as
``ops.selection_shape``, int32
``attend(q, k, v, indices, counts, tensors, scalars, mask, scale, spec, kernel, score=) -> out``   allocated by
``ops.attention_output``

with ``mask``, ``spec`` and ``score`` as text. Importing this module registers the operators.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

from stem_compile import ops, selection
from stem_compile.algebra import blind, scores
from stem_compile.algebra.blocks import candidates, cdiv, key_visible, split, unbanded
from stem_compile.algebra.masks import decode, environment
from stem_compile.kernels import reference
from stem_compile.selection import BlockSelection, oam, tpd

Tensors = Sequence[torch.Tensor]


@functools.cache
def target(device_type: str) -> ModuleType | None:
    """The target module of ``device_type``; None where there is none and the reference serves."""
    # AMD GPUs call themselves cuda in torch, and take the portable template there.
    folder = Path(__file__).parent / "targets" / device_type
    return importlib.import_module(f"stem_compile.kernels.targets.{device_type}.target") if folder.is_dir() else None


def head_dims(device_type: str) -> range:
    """Head dims that a device takes; the reference takes all."""
    found = target(device_type)
    return range(1, 1025) if found is None else found.HEAD_DIMS


def kernel_name(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: str, spec: str, score: str = "") -> str:
    """Attention kernel that ``q``'s device would run; works on fake tensors."""
    found = target(q.device.type)
    return ops.REFERENCE if found is None else str(found.kernel_name(q, k, v, mask, spec, score))


def select_name(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: str, spec: str, score: str = "") -> str:
    """Fused selection that ``q``'s device would run; works on fake tensors. Scores that depend on positions rank blocks
    by the definition."""
    found = target(q.device.type)
    positional = scores.decode(score).positional and not tpd.everything(selection.parse(spec))
    return ops.REFERENCE if found is None or positional else str(found.select_name(q, k, v, mask, spec))


def oam_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensors: Tensors,
    scalars: Sequence[int],
    mask: str,
    scale: float,
    spec: str,
    score: str = "",
) -> torch.Tensor:
    """stem::oam_scores by its definition."""
    chosen, meaning, modifier = selection.parse(spec), decode(mask), scores.decode(score)
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    visible = key_visible(meaning, shape, tensors, scalars, q.device)
    possible = candidates(meaning, shape, tensors, scalars, chosen.block_q, chosen.block_k, q.device)

    def modify(pooled: torch.Tensor) -> torch.Tensor:
        env = environment(shape, tensors, scalars) | scores.block_positions(
            pooled.shape[2], pooled.shape[3], shape, chosen.block_q, chosen.block_k, q.device
        )
        return modifier.apply(pooled, env)

    return oam.oam_scores(q, k, v, visible, possible, chosen, scale, modify if modifier.positional else None)


def tpd_select(
    block_scores: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    tensors: Tensors,
    scalars: Sequence[int],
    mask: str,
    spec: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """stem::tpd_select by its definition."""
    chosen, meaning = selection.parse(spec), decode(mask)
    reach = None
    if split(meaning).bands:
        shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        reach = candidates(unbanded(meaning), shape, tensors, scalars, chosen.block_q, chosen.block_k, q.device).sum(-1)
    made = tpd.tpd_select(block_scores, chosen, reach)
    return made.indices, made.counts


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensors: Tensors,
    scalars: Sequence[int],
    mask: str,
    scale: float,
    spec: str,
    kernel: str,
    score: str = "",
) -> tuple[torch.Tensor, torch.Tensor]:
    """stem::select: scores and selection in one."""
    chosen = selection.parse(spec)
    blocks = ops.selection_shape(q, k, chosen)
    if 0 in blocks[:3]:
        # No device launches kernels over nothing, and there is nothing to observe.
        return q.new_empty(blocks, dtype=torch.int32), q.new_empty(blocks[:3], dtype=torch.int32)
    found = target(q.device.type) if kernel != ops.REFERENCE else None
    if found is None:
        indices, counts = tpd_select(
            oam_scores(q, k, v, tensors, scalars, mask, scale, spec, score), q, k, tensors, scalars, mask, spec
        )
    else:
        indices, counts = found.select(q, k, v, tensors, scalars, mask, scale, spec, kernel)
    made = BlockSelection(indices, counts, chosen.block_q, chosen.block_k, cdiv(k.shape[2], chosen.block_k))
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    made = selection.announce(
        selection.Observed(made, mask, tuple(tensors), tuple(scalars), shape, (q, k, v), scale, spec, score)
    )
    return made.indices, made.counts


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    tensors: Tensors,
    scalars: Sequence[int],
    mask: str,
    scale: float,
    spec: str,
    kernel: str,
    score: str = "",
) -> torch.Tensor:
    """stem::sparse_attention."""
    if 0 in q.shape[:3]:
        return ops.attention_output(q, v)
    found = target(q.device.type) if kernel != ops.REFERENCE else None
    if found is not None:
        out: torch.Tensor = found.attend(
            q, k, v, indices, counts, tensors, scalars, mask, scale, spec, kernel, score=score
        )
        return out
    chosen = selection.parse(spec)
    made = BlockSelection(indices, counts, chosen.block_q, chosen.block_k, cdiv(k.shape[2], chosen.block_k))
    return reference.sparse_attention(q, k, v, made, decode(mask), tensors, scalars, scale, scores.decode(score))


def blind_rows(q: torch.Tensor, k: torch.Tensor, tensors: Tensors, scalars: Sequence[int], mask: str) -> torch.Tensor:
    """stem::blind_rows."""
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return blind.blind_rows(decode(mask), shape, tensors, scalars, q.device).contiguous()


for _name in ("oam_scores", "tpd_select", "select", "sparse_attention", "blind_rows"):
    ops.LIBRARY.impl(_name, globals()[_name], "CompositeExplicitAutograd")
