"""The ``stem::`` operators: schemas and shapes. ``kernels/launch.py`` implements them; nothing here imports triton or kernels.

A graph after insert_selection holds ``oam_scores -> tpd_select -> sparse_attention``; lowering fuses the first two into ``select`` where the
device has a kernel for it. Masks and selections travel as text (``masks.encode``, ``SelectionSpec.text``), their runtime parts as
``tensors`` (T0, T1, ... of the mask) and ``scalars`` (S0, S1, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from stem_compile import policies, selection
from stem_compile.blocks import cdiv

LIBRARY = torch.library.Library("stem", "DEF")
REFERENCE = "reference"
"""Kernel name of the plain-torch implementation."""

_MASK = "Tensor[] tensors, SymInt[] scalars, str mask"
_TAGS = (torch.Tag.needs_exact_strides,) if hasattr(torch.Tag, "needs_exact_strides") else ()

LIBRARY.define(f"oam_scores(Tensor q, Tensor k, Tensor v, {_MASK}, float scale, str spec) -> Tensor", tags=_TAGS)
LIBRARY.define(f"tpd_select(Tensor scores, {_MASK}, str spec) -> (Tensor indices, Tensor counts)", tags=_TAGS)
LIBRARY.define(f"select(Tensor q, Tensor k, Tensor v, {_MASK}, float scale, str spec, str kernel) -> (Tensor indices, Tensor counts)", tags=_TAGS)
LIBRARY.define(
    f"sparse_attention(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, {_MASK}, float scale, str spec, str kernel) -> Tensor",
    tags=_TAGS,
)


def attention_output(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Uninitialised [B, H, q_len, dv] whose memory is [B, q_len, H, dv]: the transpose and reshape that follow attention cost nothing."""
    batch, heads, q_len, _ = q.shape
    return q.new_empty(batch, q_len, heads, v.shape[-1]).transpose(1, 2)


def selection_shape(q: torch.Tensor, k: torch.Tensor, spec: selection.SelectionSpec) -> tuple[Any, Any, Any, Any]:
    """Shape of ``indices``: (B, H, query blocks, width); of ``counts`` without its last number."""
    columns = cdiv(k.shape[2], spec.block_k)
    width = policies.get(spec.policy).width(spec, columns)
    return q.shape[0], q.shape[1], cdiv(q.shape[2], spec.block_q), torch.sym_min(width, columns)


@torch.library.register_fake("stem::oam_scores", lib=LIBRARY)
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Sequence[torch.Tensor], scalars: Sequence[int], mask: str, scale: float, spec: str) -> torch.Tensor:
    parsed = selection.parse(spec)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[0], q.shape[1], cdiv(q.shape[2], parsed.block_q), cdiv(k.shape[2], parsed.block_k), dtype=dtype)


@torch.library.register_fake("stem::tpd_select", lib=LIBRARY)
def _(scores: torch.Tensor, tensors: Sequence[torch.Tensor], scalars: Sequence[int], mask: str, spec: str) -> tuple[torch.Tensor, torch.Tensor]:
    parsed = selection.parse(spec)
    width = torch.sym_min(policies.get(parsed.policy).width(parsed, scores.shape[3]), scores.shape[3])
    return scores.new_empty(*scores.shape[:3], width, dtype=torch.int32), scores.new_empty(scores.shape[:3], dtype=torch.int32)


@torch.library.register_fake("stem::select", lib=LIBRARY)
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Sequence[torch.Tensor], scalars: Sequence[int], mask: str, scale: float, spec: str, kernel: str) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    shape = selection_shape(q, k, selection.parse(spec))
    return q.new_empty(shape, dtype=torch.int32), q.new_empty(shape[:3], dtype=torch.int32)


@torch.library.register_fake("stem::sparse_attention", lib=LIBRARY)
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, counts: torch.Tensor, tensors: Sequence[torch.Tensor], scalars: Sequence[int], mask: str, scale: float, spec: str, kernel: str) -> torch.Tensor:  # fmt: skip
    return attention_output(q, v)
