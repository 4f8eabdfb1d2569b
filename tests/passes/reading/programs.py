"""Random programs that build attention masks, as models do: each a function of (q, k, v, padding) that calls SDPA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

Index = tuple[torch.Tensor, torch.Tensor]

# Spellings of the same index grids: (rows [.., N, 1], keys [.., 1, M]) of int64.
GRIDS: dict[str, Callable[[int, int], Index]] = {
    "none": lambda n, m: (torch.arange(n)[:, None], torch.arange(m)[None, :]),
    "unsqueeze": lambda n, m: (torch.arange(0, n).unsqueeze(-1), torch.arange(0, m).unsqueeze(0)),
    "view": lambda n, m: (torch.arange(n).view(-1, 1), torch.arange(m).view(1, -1)),
    "reshape4": lambda n, m: (torch.arange(n).reshape(1, 1, n, 1), torch.arange(m).reshape(1, 1, 1, m)),
    "expand": lambda n, m: (torch.arange(n)[:, None].expand(n, m), torch.arange(m).expand(n, m)),
    "transpose": lambda n, m: (torch.arange(n)[None, :].transpose(0, 1), torch.arange(m)[:, None].t()),
    "shifted": lambda n, m: (torch.arange(3, n + 3)[:, None] - 3, torch.arange(m)[None, :].to(torch.int32).long()),
    "strided": lambda n, m: (torch.arange(0, 2 * n, 2)[:, None] // 2, torch.arange(m).permute(0)[None]),
}
# Spellings of "key is not after query", given the offset of the first query.
CAUSAL: dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "le": lambda q, k, o: k <= q + o,
    "ge": lambda q, k, o: (q + o) >= k,
    "lt": lambda q, k, o: torch.lt(k, q + (o + 1)),
    "not gt": lambda q, k, o: ~(k > q + o),
    "logical_not": lambda q, k, o: torch.logical_not(torch.gt(k - o, q)),
    "difference": lambda q, k, o: (q - k) >= -o,
    "negated": lambda q, k, o: -k + o + q > -1,
    "where": lambda q, k, o: torch.where(k > q + o, False, True),
    "tril": lambda q, k, o: torch.ones((q + k).shape, dtype=torch.bool).tril(o),
    "triu": lambda q, k, o: ~torch.ones((q + k).shape[-2:], dtype=torch.bool).triu(diagonal=o + 1),
    "masked_fill": lambda q, k, o: torch.ones((q + k).shape, dtype=torch.bool).masked_fill(k > q + o, False),
    "twice the difference": lambda q, k, o: 2 * k <= 2 * (q + o),
}
# Spellings of "this key is real", [B, 1, 1, M].
PADDING: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda p: p[:, None, None, :],
    "bool": lambda p: p.long().bool()[:, None, None],
    "eq": lambda p: (p.long() == 1).view(p.shape[0], 1, 1, p.shape[1]),
    "not": lambda p: ~(p == 0)[:, None, None, :],
    "ne": lambda p: (p.int() != 0).unsqueeze(1).unsqueeze(1),
    "gather": lambda p: p[torch.arange(p.shape[0])[:, None, None, None], torch.arange(p.shape[1])[None, None, None, :]],
    "absent": lambda p: torch.ones((), dtype=torch.bool),
}
# What else a mask may say, of (rows, keys, padding): windows, chunks, documents, prefixes, sinks. True is visible.
TERMS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "window": lambda q, k, p: k > q - 9,
    "window by difference": lambda q, k, p: (q - k) < 9,
    "window by triu": lambda q, k, p: torch.ones((q + k).shape[-2:], dtype=torch.bool).triu(-8),
    "window by abs": lambda q, k, p: (q - k).abs() <= 8,
    "chunks": lambda q, k, p: q // 16 == k // 16,
    "chunks by floor": lambda q, k, p: torch.div(q, 16, rounding_mode="floor") == torch.floor_divide(k, 16),
    "chunks from the padding": lambda q, k, p: (
        (q + (~p).sum(-1)[:, None, None, None]) // 16 == (k + (~p).sum(-1)[:, None, None, None]) // 16
    ),
    "stripes": lambda q, k, p: (k % 4 != 3) | (k == q),
    "prefix": lambda q, k, p: (k < 5) | (k <= q),
    "sinks and a window": lambda q, k, p: (k < 2) | (k >= q - 7),
    "documents": lambda q, k, p: (
        _ids(p)[..., torch.arange((q + k).shape[-2]), None] == _ids(p)[..., None, torch.arange((q + k).shape[-1])]
    ),
    "clamped": lambda q, k, p: torch.clamp(k, max=12) <= torch.maximum(q, torch.tensor(12)),
    "xor": lambda q, k, p: (k > q) ^ True,
    "selected": lambda q, k, p: torch.where(k < 6, q >= 0, k > q - 11),
}


def _ids(padding: torch.Tensor) -> torch.Tensor:
    """Document ids [B, 1, M] that only the run knows."""
    return (~padding).cumsum(-1)[:, None]


# A Boolean mask as what is added to scores.
FLOATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "bool": lambda m: m,
    "where": lambda m: torch.where(m, 0.0, torch.finfo(torch.float32).min),
    "masked_fill": lambda m: torch.zeros(m.shape).masked_fill(~m, -torch.inf),
    "multiplied": lambda m: (1.0 - m.to(torch.float32)) * torch.finfo(torch.float32).min,
    "subtracted": lambda m: (m.float() - 1) * 1e9,
}
JOIN: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "&": lambda a, b: a & b,
    "logical_and": torch.logical_and,
    "mul": lambda a, b: a * b,
    "de morgan": lambda a, b: ~(~a | ~b),
    "masked_fill": lambda a, b: (a & torch.ones_like(b)).masked_fill(~b, False),
}


@dataclass(frozen=True)
class Program:
    """One spelling of a causal mask with padding, and the sizes to run it at."""

    grid: str = "none"
    causal: str = "le"
    padding: str = "none"
    join: str = "&"
    terms: tuple[str, ...] = ()
    floats: str = "bool"
    swapped: bool = False
    q_len: int = 20
    prefix: int = 0
    batch: int = 2

    def mask(self, padding: torch.Tensor, q_len: int, kv_len: int) -> torch.Tensor:
        """The Boolean mask as the model would build it."""
        rows, keys = GRIDS[self.grid](q_len, kv_len)
        parts = [CAUSAL[self.causal](rows, keys, kv_len - q_len), PADDING[self.padding](padding)]
        mask = JOIN[self.join](*(reversed(parts) if self.swapped else parts))
        for term in self.terms:
            mask = mask & TERMS[term](rows, keys, padding)
        return FLOATS[self.floats](mask)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask(padding, q.shape[2], k.shape[2]))

    def inputs(self) -> tuple[torch.Tensor, ...]:
        """q, k, v and a padding mask with holes."""
        generator = torch.Generator().manual_seed(self.q_len)
        q, k, v = (
            torch.randn(self.batch, 2, n, 16, generator=generator)
            for n in (self.q_len, self.q_len + self.prefix, self.q_len + self.prefix)
        )
        return q, k, v, torch.rand(self.batch, self.q_len + self.prefix, generator=generator) < 0.7


def programs(wide: bool = False) -> st.SearchStrategy[Program]:
    """Random spellings at random sizes. wide: more than causal and padding, and masks that are added."""
    choose: dict[str, Any] = {
        name: st.sampled_from(sorted(table))
        for name, table in (("grid", GRIDS), ("causal", CAUSAL), ("padding", PADDING), ("join", JOIN))
    }
    more = (
        {
            "terms": st.lists(st.sampled_from(sorted(TERMS)), max_size=2).map(tuple),
            "floats": st.sampled_from(sorted(FLOATS)),
        }
        if wide
        else {}
    )
    return st.builds(
        Program,
        **choose,
        **more,
        swapped=st.booleans(),
        q_len=st.integers(17, 60),
        prefix=st.sampled_from((0, 0, 7, 33)),
        batch=st.integers(1, 3),
    )
