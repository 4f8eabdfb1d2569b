"""One attention as everything behind the operators takes it: tensors, and the texts that say what is done to them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from stem_compile.algebra import masks, scores
from stem_compile.algebra.blocks import Shape, cdiv
from stem_compile.algebra.bound import BoundMask
from stem_compile.algebra.scores import Score
from stem_compile.selection.spec import ALL, BlockSelection, SelectionSpec, parse


@dataclass(frozen=True, eq=False, init=False)
class Attention:
    """softmax(score(scale q k^T)) v over the visible keys of the selected blocks.

    q: [B, H, q_len, d]; k: [B, Hk, kv_len, d]; v: [B, Hk, kv_len, dv], H a multiple of Hk; of one dtype, real or fake.
    mask_text: ``masks.encode``. spec_text: ``SelectionSpec.text()``. score_text: ``Score.text``. tensors: T0, T1, ...
    of mask and score; scalars: S0, S1, ... scale: factor of q.k before the score.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask_text: str = "True"
    scale: float = 1.0
    spec_text: str = ""
    score_text: str = ""
    tensors: Sequence[torch.Tensor] = ()
    scalars: Sequence[int] = ()

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask_text: str = "True",
        scale: float = 1.0,
        spec_text: str = "",
        score_text: str = "",
        tensors: Sequence[torch.Tensor] = (),
        scalars: Sequence[int] = (),
    ) -> None:
        # A frozen dataclass sets its fields one by one, which costs a call on a GPU several microseconds.
        self.__dict__.update(
            q=q, k=k, v=v, mask_text=mask_text, scale=scale, spec_text=spec_text, score_text=score_text,
            tensors=tensors, scalars=scalars,
        )  # fmt: skip

    @functools.cached_property
    def shape(self) -> Shape:
        """(batch, query heads, q_len, kv_len)."""
        batch, heads, q_len, _ = self.q.shape
        return batch, heads, q_len, self.k.shape[2]

    @property
    def widths(self) -> tuple[int, int]:
        """(d, dv) as numbers: kernels are compiled for them, and what is compiled is remembered by them. At compile
        time a dimension may be a symbol, which is no key of a cache."""
        return int(self.q.shape[-1]), int(self.v.shape[-1])

    @property
    def device(self) -> torch.device:
        """Where q is."""
        return self.q.device

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def spec(self) -> SelectionSpec:
        """What the selection depends on."""
        return parse(self.spec_text)

    @property
    def score(self) -> Score:
        """What happens to scaled products."""
        return scores.decode(self.score_text)

    @functools.cached_property
    def mask(self) -> BoundMask:
        """The mask on this attention's tensors."""
        return BoundMask(masks.decode(self.mask_text), self.shape, self.tensors, self.scalars, self.device)

    def to(self, dtype: torch.dtype) -> Attention:
        """The same with q, k and v in another dtype."""
        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype))

    def selection(self, indices: torch.Tensor, counts: torch.Tensor) -> BlockSelection:
        """Lists of this attention's blocks, shaped as ``BlockSelection`` says."""
        return BlockSelection(indices, counts, self.spec.block_q, self.spec.block_k, self.blocks[1])

    @functools.cached_property
    def blocks(self) -> tuple[int, int]:
        """(query blocks, key blocks)."""
        return cdiv(self.shape[2], self.spec.block_q), cdiv(self.shape[3], self.spec.block_k)

    @property
    def candidates(self) -> torch.Tensor:
        """Bool [B or 1, H or 1, query blocks, key blocks]: pairs that may hold a visible score."""
        return self.mask.candidates(self.spec.block_q, self.spec.block_k)

    @property
    def reach(self) -> torch.Tensor | None:
        """Candidates of each row without the mask's far edges, [B or 1, H or 1, query blocks], ``ALL`` for one that is
        to compute all it sees; None where each row's candidates say it."""
        near = self.mask.reach(self.spec.block_q, self.spec.block_k)
        unordered = self._unordered_rows
        if unordered is None:
            return near
        return torch.where(unordered, ALL, self.candidates.sum(-1) if near is None else near)

    @property
    def _unordered_rows(self) -> torch.Tensor | None:
        """Bool [B or 1, H or 1, query blocks]: rows of blocks that see past their own place, under a policy that counts
        on an order of positions; None where the mask rules them out. Among them are queries of padding that a model
        lets see everything: their block's last candidates are not where its other queries look."""
        from stem_compile.selection import policies

        parts = self.mask.parts
        if not parts.others or parts.causal is not None or policies.get(self.spec.policy).ANY_ORDER:
            return None
        (rows, columns), (_, _, q_len, kv_len) = self.blocks, self.shape
        ends = (torch.arange(1, rows + 1, device=self.device) * self.spec.block_q).clamp(max=q_len) + kv_len - q_len
        beyond = torch.arange(columns, device=self.device) * self.spec.block_k >= ends[:, None]
        return (self.candidates & beyond).any(-1)
