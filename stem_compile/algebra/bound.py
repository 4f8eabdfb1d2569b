"""A mask on one attention's tensors: what blocks, keys and rows it leaves visible, each found once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stem_compile.algebra import blind, blocks, symbolic
from stem_compile.algebra.blocks import Shape
from stem_compile.algebra.masks import Mask, environment
from stem_compile.algebra.symbolic import KV, B, H, Q


@dataclass(frozen=True, eq=False)
class BoundMask:
    """``mask`` over scores of ``shape`` = (batch, query heads, q_len, kv_len) on ``device``, with the values of what it
    reads: tensors (T0, T1, ...) and scalars (S0, S1, ...)."""

    mask: Mask
    shape: Shape
    tensors: Sequence[torch.Tensor]
    scalars: Sequence[int]
    device: torch.device

    @functools.cached_property
    def environment(self) -> dict[Any, Any]:
        """Bindings of lengths, scalars and tensors for ``symbolic.evaluate``."""
        return environment(self.shape, self.tensors, self.scalars)

    @functools.cached_property
    def parts(self) -> blocks.Parts:
        """The mask's terms by what they mean to blocks."""
        return blocks.split(self.mask)

    @functools.cached_property
    def _candidates(self) -> dict[tuple[int, int], torch.Tensor]:
        return {}

    def candidates(self, block_q: int, block_k: int) -> torch.Tensor:
        """Bool [B or 1, H or 1, query blocks, key blocks]: pairs that may hold a visible score."""
        if (block_q, block_k) not in self._candidates:
            self._candidates[block_q, block_k] = blocks.candidates(
                self.mask, self.shape, self.tensors, self.scalars, block_q, block_k, self.device
            )
        return self._candidates[block_q, block_k]

    def reach(self, block_q: int, block_k: int) -> torch.Tensor | None:
        """int64 [B or 1, H or 1, query blocks]: candidates of a row without the mask's far edges; None where it has
        none."""
        if not self.parts.bands:
            return None
        near = blocks.unbanded(self.mask)
        return blocks.candidates(near, self.shape, self.tensors, self.scalars, block_q, block_k, self.device).sum(-1)

    @functools.cached_property
    def visible(self) -> torch.Tensor | None:
        """Bool [B or 1, kv_len]: keys that the terms about keys alone leave visible; None without such terms."""
        return blocks.key_visible(self.mask, self.shape, self.tensors, self.scalars, self.device)

    def first_visible(self, block_k: int) -> torch.Tensor:
        """int32 [B or 1, key blocks]: position of each block's first visible key, kv_len where it has none."""
        return blocks.first_visible(self.visible, self.shape[3], block_k, self.device)

    @property
    def causal_offset(self) -> int | None:
        """Keys before the first query row under the causal term; None without one. Reads a 0-d tensor's value back."""
        return blocks.causal_offset(self.mask, self.shape, self.tensors, self.scalars)

    def dense(self, rows: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """Bool, broadcastable to (batch, heads, rows, kv_len): True is visible."""
        return self.mask.dense(self.shape, self.tensors, self.scalars, self.device, rows)

    def at(self, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Bool [B or 1, H or 1, len(rows), len(keys)]: whether pairs of positions are visible; one past the end of the
        queries or of the keys is not."""
        batch, heads, q_len, kv_len = self.shape
        rows, keys = rows.view(1, 1, -1, 1), keys.view(1, 1, 1, -1)
        b, h = (torch.arange(n, device=self.device).view(-1, *(1,) * after) for n, after in ((batch, 3), (heads, 2)))
        visible = symbolic.evaluate(self.mask.predicate, self.environment | {B: b, H: h, Q: rows, KV: keys})
        shown: torch.Tensor = symbolic.as_tensor(visible, self.device) & (rows < q_len) & (keys < kv_len)
        return shown

    def blind_rows(self) -> torch.Tensor:
        """Bool [B, H or 1, q_len, 1]: rows to which no key is visible."""
        return blind.blind_rows(self.mask, self.shape, self.tensors, self.scalars, self.device)
