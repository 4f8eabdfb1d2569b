"""Implementations of the ``stem::`` operators: the target of the tensors' device, or the plain-torch definitions.

Importing this module registers the operators.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from stem_compile import ops, selection
from stem_compile.algebra.bound import BoundMask
from stem_compile.algebra.masks import decode
from stem_compile.kernels import reference
from stem_compile.kernels.blind import blind_attention
from stem_compile.kernels.contract import DEFINITION, TARGETS, Kernels, Target
from stem_compile.reasons import KernelWarning, Reason
from stem_compile.registry import RegistryError
from stem_compile.selection import FULL, Attention, BlockSelection, oam, tpd

log = logging.getLogger(__name__)

Tensors = Sequence[torch.Tensor]
Result = TypeVar("Result")


@TARGETS.caches
@functools.cache
def target(device_type: str) -> Target | None:
    """The target of ``device_type``; None where there is none. One that cannot be used is none, with a warning."""
    # AMD GPUs call themselves cuda in torch, and take the portable template there.
    if device_type not in TARGETS:
        return None
    try:
        return TARGETS.get(device_type)
    except RegistryError as error:
        warnings.warn(f"attention on {device_type} stays dense: {error}", stacklevel=2)
        return None


def refusal(attention: Attention) -> Reason | None:
    """Why q's device cannot compute an attention, of fake or real tensors; None where it can."""
    device = target(attention.device.type)
    return Reason.DEVICE if device is None else device.supports(attention)


def kernels(attention: Attention) -> Kernels:
    """Names of the kernels that run for an attention that is not refused. Raises ValueError for one that is."""
    device, reason = target(attention.device.type), refusal(attention)
    if device is None or reason is not None:
        raise ValueError(f"{attention.device.type}: {(reason or Reason.DEVICE).value}")
    return device.kernels(attention)


def _serving(attention: Attention) -> Target:
    device = target(attention.device.type)
    if device is None:
        raise RuntimeError(f"no kernels for {attention.device.type}")
    return device


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
    return oam.oam_scores(Attention(q, k, v, mask, scale, spec, score, tensors, scalars))


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
    attention = Attention(q, k, k, mask, spec_text=spec, tensors=tensors, scalars=scalars)
    lists = tpd.tpd_select(block_scores, attention.spec, attention.reach, k.shape[1])
    return lists.indices, lists.counts


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
    fallback: str = "dense",
) -> tuple[torch.Tensor, torch.Tensor]:
    """stem::select: scores and selection in one."""
    attention = Attention(q, k, v, mask, scale, spec, score, tensors, scalars)
    shape = ops.counts_shape(q, attention.spec)
    if 0 in shape:
        # No device launches kernels over nothing, and there is nothing to observe.
        whole = ops.selection_shape(q, k, attention.spec)
        return q.new_empty(whole, dtype=torch.int32), q.new_empty(shape, dtype=torch.int32)

    def lists() -> BlockSelection:
        if kernel == DEFINITION:
            return tpd.tpd_select(oam.oam_scores(attention), attention.spec, attention.reach, k.shape[1])
        return attention.selection(*_serving(attention).select(attention, kernel))

    selected = _answered(attention, kernel, fallback, lists, lambda: all_blocks(attention))
    selected = selection.announce(selection.Observed(selected, attention))
    return selected.indices, selected.counts


def all_blocks(attention: Attention) -> BlockSelection:
    """The selection of all blocks with a visible key."""
    shape = ops.selection_shape(attention.q, attention.k, attention.spec)
    counts = torch.full(ops.counts_shape(attention.q, attention.spec), FULL, dtype=torch.int32, device=attention.device)
    return attention.selection(torch.zeros(shape, dtype=torch.int32, device=attention.device), counts)


_told: set[tuple[str, str, str]] = set()


def _answered(
    attention: Attention, kernel: str, fallback: str, run: Callable[[], Result], dense: Callable[[], Result]
) -> Result:
    """What ``run`` gives. Where it fails, other than for want of memory: what ``dense`` gives, with one warning for a
    kernel, a mask and an error; under ``fallback="error"`` the failure itself."""
    try:
        return run()
    except Exception as error:
        if fallback == "error" or _is_out_of_memory(error):
            raise
        log.debug("%s failed", kernel, exc_info=True)
        said = kernel, attention.mask_text, f"{type(error).__name__}: {error}"
        if said not in _told:
            warnings.warn(
                f"kernel {kernel!r} failed and dense attention under the same mask answered: {said[2]}. Set"
                " fallback='error' to have it raised.",
                KernelWarning,
                stacklevel=2,
            )
            _told.add(said)
    return dense()


def _is_out_of_memory(error: Exception) -> bool:
    # A CPU's allocator has no exception of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)


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
    fallback: str = "dense",
) -> torch.Tensor:
    """stem::sparse_attention."""
    if 0 in q.shape[:3]:
        return ops.attention_output(q, v)
    attention = Attention(q, k, v, mask, scale, spec, score, tensors, scalars)
    lists = attention.selection(indices, counts)
    if kernel == ops.REFERENCE:
        return reference.sparse_attention(attention, lists)
    out = _answered(
        attention,
        kernel,
        fallback,
        lambda: _serving(attention).attend(attention, lists, kernel),
        lambda: reference.sparse_attention(attention, all_blocks(attention)),
    )
    return out if _is_laid_out(out) else ops.attention_output(q, v).copy_(out)


def _is_laid_out(out: torch.Tensor) -> bool:
    """Whether memory is as ``ops.attention_output`` promises. Strides are compared as numbers first, which costs less
    than asking torch."""
    _, heads, length, width = out.shape
    return out.stride() == (length * heads * width, width, heads * width, 1) or out.transpose(1, 2).is_contiguous()


def blind_rows(q: torch.Tensor, k: torch.Tensor, tensors: Tensors, scalars: Sequence[int], mask: str) -> torch.Tensor:
    """stem::blind_rows."""
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return BoundMask(decode(mask), shape, tensors, scalars, q.device).blind_rows().contiguous()


for _operator in (oam_scores, tpd_select, select, sparse_attention, blind_rows, blind_attention):
    ops.LIBRARY.impl(_operator.__name__, _operator, "CompositeExplicitAutograd")
