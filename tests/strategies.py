"""Hypothesis strategies: small records (shapes, seeds, options), never tensors, so that a failure shrinks to one
readable line."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
from hypothesis import strategies as st

from stem_compile.algebra import masks
from stem_compile.algebra.masks import Causal, Mask, Padding
from stem_compile.algebra.symbolic import KV, FloorDiv, Q
from stem_compile.selection import SelectionSpec


@dataclass(frozen=True)
class Case:
    """One attention problem. prefix: keys before the first query. padding: "none", "left", "right" or "holes", per
    batch row."""

    batch: int = 1
    key_heads: int = 1
    group: int = 1
    q_len: int = 70
    prefix: int = 0
    head_dim: int = 16
    value_dim: int = 16
    padding: str = "none"
    transposed: bool = False
    seed: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, q_len, kv_len)."""
        return self.batch, self.key_heads * self.group, self.q_len, self.q_len + self.prefix

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def qkv(self, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same numbers in any dtype: drawn in the case's own, then cast."""
        generator = torch.Generator().manual_seed(self.seed)
        batch, heads, q_len, kv_len = self.shape
        sizes = (
            (heads, q_len, self.head_dim),
            (self.key_heads, kv_len, self.head_dim),
            (self.key_heads, kv_len, self.value_dim),
        )
        tensors = []
        for h, n, d in sizes:
            x = (
                torch.randn(batch, n, h, d, generator=generator).transpose(1, 2)
                if self.transposed
                else torch.randn(batch, h, n, d, generator=generator)
            )
            tensors.append(x.to(self.dtype).to(dtype or self.dtype))
        return tensors[0], tensors[1], tensors[2]

    def mask(self) -> tuple[Mask, list[torch.Tensor]]:
        """The mask and its tensors."""
        causal: Mask = Causal(self.prefix)
        if self.padding == "none":
            return causal, []
        kv_len = self.shape[3]
        generator = torch.Generator().manual_seed(self.seed + 1)
        keep = torch.ones(self.batch, kv_len, dtype=torch.bool)
        for row in range(self.batch):
            cut = int(torch.randint(0, kv_len, (), generator=generator))
            if self.padding == "left":
                keep[row, :cut] = False
            elif self.padding == "right":
                keep[row, kv_len - cut :] = False
            else:
                keep[row] = torch.rand(kv_len, generator=generator) < 0.5
        return causal & Padding(0), [keep]


def cases(dtypes: tuple[torch.dtype, ...] = (torch.float32,), longest: int = 200) -> st.SearchStrategy[Case]:
    """Attention problems up to ``longest`` queries."""
    return st.builds(
        Case,
        batch=st.integers(1, 2),
        key_heads=st.integers(1, 2),
        group=st.integers(1, 3),
        q_len=st.integers(1, longest),
        prefix=st.one_of(st.just(0), st.integers(1, 150)),
        head_dim=st.sampled_from((16, 24, 32)),
        value_dim=st.sampled_from((16, 32)),
        padding=st.sampled_from(("none", "left", "right", "holes")),
        transposed=st.booleans(),
        seed=st.integers(0, 1000),
        dtype=st.sampled_from(dtypes),
    )


def specs(scored: bool = True) -> st.SearchStrategy[SelectionSpec]:
    """Selections with blocks small enough for small problems."""
    return st.builds(
        SelectionSpec,
        policy=st.just("stem") if scored else st.sampled_from(("stem", "dense")),
        budget=st.one_of(st.none(), st.sampled_from((0.1, 0.25, 0.5, 0.9, 1.0))),
        mu=st.sampled_from((0.0, 0.3, 0.7, 1.0)),
        beta=st.sampled_from((0.0, 0.2)),
        metric=st.sampled_from(("paper", "released")),
        pooling=st.sampled_from(("mean", "max")),
        stride=st.sampled_from((8, 16)),
        block_q=st.sampled_from((64, 128)),
        block_k=st.sampled_from((32, 64)),
        sink_blocks=st.integers(0, 1),
        local_blocks=st.just(1),
    )


def terms(tensors: int = 1) -> st.SearchStrategy[Mask]:
    """Masks of the algebra with at most ``tensors`` mask tensors, nested a little."""
    leaf = st.one_of(
        st.just(masks.Full()),
        st.integers(-3, 40).map(Causal),
        st.integers(0, tensors - 1).map(Padding),
        st.integers(1, 30).map(lambda w: masks.predicate(Q - KV < w)),
        st.integers(2, 20).map(lambda c: masks.predicate(sympy.Eq(FloorDiv(Q, c), FloorDiv(KV, c)))),
    )
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            st.tuples(inner, inner).map(lambda p: p[0] & p[1]), st.tuples(inner, inner).map(lambda p: p[0] | p[1])
        ),
        max_leaves=4,
    )
