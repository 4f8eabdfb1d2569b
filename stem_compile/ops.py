"""The ``stem::`` operators: schemas and shapes. ``kernels/launch.py`` implements them; nothing here imports triton or
kernels.

A graph after insert_selection holds ``oam_scores -> tpd_select -> sparse_attention``; lowering fuses the first two into
``select`` where the device has a kernel for it. ``blind_rows`` is there where rows without a visible key are not to
give 0, and ``blind_attention`` where they are not the mean of all values either. Masks, scores and selections travel as
text (``masks.encode``, ``Score.text``, ``SelectionSpec.text``), their runtime parts as ``tensors`` (T0, T1, ... of mask
and score) and ``scalars`` (S0, S1, ...). ``fallback`` says what happens when a kernel fails: "dense" answers the call
by dense attention under the same mask, "error" raises.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from stem_compile import selection
from stem_compile.algebra import masks
from stem_compile.algebra.blocks import cdiv
from stem_compile.algebra.symbolic import H
from stem_compile.selection import tpd

LIBRARY = torch.library.Library("stem", "DEF")
REFERENCE = "reference"
"""Kernel name of the plain-torch implementation."""

_MASK = "Tensor[] tensors, SymInt[] scalars, str mask"
_TAGS = (torch.Tag.needs_exact_strides,) if hasattr(torch.Tag, "needs_exact_strides") else ()

LIBRARY.define(
    f"oam_scores(Tensor q, Tensor k, Tensor v, {_MASK}, float scale, str spec, str score='') -> Tensor", tags=_TAGS
)
LIBRARY.define(
    f"tpd_select(Tensor scores, Tensor q, Tensor k, {_MASK}, str spec) -> (Tensor indices, Tensor counts)", tags=_TAGS
)
LIBRARY.define(
    f"select(Tensor q, Tensor k, Tensor v, {_MASK}, float scale, str spec, str kernel, str score='', str"
    " fallback='dense') -> (Tensor"
    " indices, Tensor counts)",
    tags=_TAGS,
)
LIBRARY.define(
    f"sparse_attention(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, {_MASK}, float scale, str spec, str"
    " kernel, str score='', str fallback='dense') -> Tensor",
    tags=_TAGS,
)
LIBRARY.define(f"blind_rows(Tensor q, Tensor k, {_MASK}) -> Tensor")
LIBRARY.define(
    "blind_attention(Tensor q, Tensor k, Tensor v, Tensor blind, Tensor[] tensors, SymInt[] scalars, str logits,"
    " ScalarType dtype) -> Tensor",
    tags=_TAGS,
)

OAM_SCORES = torch.ops.stem.oam_scores.default
TPD_SELECT = torch.ops.stem.tpd_select.default
SELECT = torch.ops.stem.select.default
SPARSE_ATTENTION = torch.ops.stem.sparse_attention.default
BLIND_ROWS = torch.ops.stem.blind_rows.default
BLIND_ATTENTION = torch.ops.stem.blind_attention.default


class SparseAttentionArgs(NamedTuple):
    """Arguments of ``stem::sparse_attention`` by name, in a graph (nodes) or in a call (tensors). Give them back to a
    node as ``node.args = args``."""

    q: Any
    k: Any
    v: Any
    indices: Any
    counts: Any
    tensors: Any
    scalars: Any
    mask: str
    scale: float
    spec: str
    kernel: str
    score: str = ""
    fallback: str = "dense"

    @classmethod
    def of(cls, node: fx.Node) -> SparseAttentionArgs:
        """Arguments of a ``stem::sparse_attention`` node. Raises ValueError for any other node."""
        if node.target is not SPARSE_ATTENTION:
            raise ValueError(f"{node.name} calls {node.target}, not stem::sparse_attention")
        return cls(*node.args, **node.kwargs)  # type: ignore[arg-type]

    @classmethod
    def for_(cls, attention: selection.Attention, lists: selection.BlockSelection, kernel: str) -> SparseAttentionArgs:
        """Arguments of a call that computes ``attention`` in the blocks listed."""
        a = attention
        return cls(
            a.q, a.k, a.v, lists.indices, lists.counts, list(a.tensors), list(a.scalars), a.mask_text, a.scale,
            a.spec_text, kernel, a.score_text,
        )  # fmt: skip

    def with_kernel(self, kernel: str) -> SparseAttentionArgs:
        """The same, computed by ``kernel``."""
        return self._replace(kernel=kernel)

    def selection(self, kernel: str) -> tuple[Any, ...]:
        """Arguments of the ``stem::select`` that makes the block lists."""
        return (
            self.q, self.k, self.v, self.tensors, self.scalars, self.mask, self.scale, self.spec, kernel, self.score,
            self.fallback,
        )  # fmt: skip


def attention_output(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Uninitialised [B, H, q_len, dv] whose memory is [B, q_len, H, dv]: the transpose and reshape that follow
    attention cost nothing."""
    batch, heads, q_len, _ = q.shape
    return q.new_empty(batch, q_len, heads, v.shape[-1]).transpose(1, 2)


def list_capacity(k: torch.Tensor, spec: selection.SelectionSpec) -> Any:
    """Blocks a head that ``indices`` have room for in each row."""
    return tpd.list_width(spec, cdiv(k.shape[2], spec.block_k))


def selection_shape(q: torch.Tensor, k: torch.Tensor, spec: selection.SelectionSpec) -> tuple[Any, ...]:
    """Shape of ``indices``: (B, H, query blocks, width), or (B, query blocks, H * width) where heads share budgets."""
    return _lists_shape(counts_shape(q, spec), list_capacity(k, spec), spec)


def counts_shape(q: torch.Tensor, spec: selection.SelectionSpec) -> tuple[Any, Any, Any]:
    """Shape of ``counts``: (B, H, query blocks)."""
    return q.shape[0], q.shape[1], cdiv(q.shape[2], spec.block_q)


def _lists_shape(rows: Any, width: Any, spec: selection.SelectionSpec) -> tuple[Any, ...]:
    batch, heads, blocks = rows
    return (batch, heads, blocks, width) if spec.share == "none" else (batch, blocks, heads * width)


def _fake(name: str) -> Any:
    return torch.library.register_fake(f"stem::{name}", lib=LIBRARY)


@_fake("oam_scores")  # type: ignore[untyped-decorator]
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensors: Any,
    scalars: Any,
    mask: str,
    scale: float,
    spec: str,
    score: str = "",
) -> torch.Tensor:
    parsed = selection.parse(spec)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(
        q.shape[0], q.shape[1], cdiv(q.shape[2], parsed.block_q), cdiv(k.shape[2], parsed.block_k), dtype=dtype
    )


@_fake("tpd_select")  # type: ignore[untyped-decorator]
def _(
    scores: torch.Tensor, q: torch.Tensor, k: torch.Tensor, tensors: Any, scalars: Any, mask: str, spec: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return _lists(scores, scores.shape, selection.parse(spec))


@_fake("select")  # type: ignore[untyped-decorator]
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensors: Any,
    scalars: Any,
    mask: str,
    scale: float,
    spec: str,
    kernel: str,
    score: str = "",
    fallback: str = "dense",
) -> Any:
    parsed = selection.parse(spec)
    return _lists(
        q, (q.shape[0], q.shape[1], cdiv(q.shape[2], parsed.block_q), cdiv(k.shape[2], parsed.block_k)), parsed
    )


@_fake("sparse_attention")  # type: ignore[untyped-decorator]
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    tensors: Any,
    scalars: Any,
    mask: str,
    scale: float,
    spec: str,
    kernel: str,
    score: str = "",
    fallback: str = "dense",
) -> torch.Tensor:
    if k.shape[1] != v.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads, {k.shape[1]} key heads and {v.shape[1]} value heads: keys and values"
            " need the same number of heads, and a whole number of query heads each"
        )
    return attention_output(q, v)


@_fake("blind_rows")  # type: ignore[untyped-decorator]
def _(q: torch.Tensor, k: torch.Tensor, tensors: Any, scalars: Any, mask: str) -> torch.Tensor:
    heads = q.shape[1] if H in masks.decode(mask).predicate.free_symbols else 1
    return q.new_empty(q.shape[0], heads, q.shape[2], 1, dtype=torch.bool)


@_fake("blind_attention")  # type: ignore[untyped-decorator]
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blind: torch.Tensor,
    tensors: Any,
    scalars: Any,
    logits: str,
    dtype: torch.dtype,
) -> torch.Tensor:
    return attention_output(q, v)


def _lists(like: torch.Tensor, blocks: Any, spec: selection.SelectionSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Empty (indices, counts) for ``blocks`` = (B, H, query blocks, key blocks)."""
    shape = _lists_shape(blocks[:3], tpd.list_width(spec, blocks[3]), spec)
    return like.new_empty(shape, dtype=torch.int32), like.new_empty(tuple(blocks[:3]), dtype=torch.int32)
