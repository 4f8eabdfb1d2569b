"""One attention written many ways gives one site: the same mask, the same scale, the same score, the same output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_compile.algebra.masks import Causal
from tests.numerics import assert_close
from tests.passes.capture import rewritten

Tensor = torch.Tensor
SCALE = 0.3

PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda q, k: torch.matmul(q, k.transpose(-1, -2)),
    "operator": lambda q, k: q @ k.transpose(2, 3),
    "permute": lambda q, k: q.matmul(k.permute(0, 1, 3, 2)),
    "einsum": lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k),
    "einsum turned": lambda q, k: torch.einsum("bhkd,bqhd->bhqk", k, q.transpose(1, 2)),
    "bmm": lambda q, k: torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(*q.shape[:3], k.shape[2]),
    "baddbmm": lambda q, k: torch.baddbmm(
        q.new_empty(1, 1, 1), q.reshape(-1, *q.shape[2:]), k.reshape(-1, *k.shape[2:]).transpose(-1, -2), beta=0
    ).unflatten(0, q.shape[:2]),
    "given transposed": lambda q, k: q @ k.transpose(-1, -2).contiguous(),
    "cast": lambda q, k: torch.matmul(q.float(), k.float().transpose(-1, -2)),
}
SCALES: dict[str, Callable[[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]], Tensor]] = {
    "times": lambda q, k, product: product(q, k) * SCALE,
    "over": lambda q, k, product: product(q, k) / (1 / SCALE),
    "in place": lambda q, k, product: product(q, k).mul_(SCALE),
    "tensor": lambda q, k, product: product(q, k) * torch.tensor(0.3),
    "twice": lambda q, k, product: (product(q, k) * 3.0).div(3.0 / SCALE),
}
MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "added": lambda s, m: s + torch.where(m, 0.0, torch.finfo(s.dtype).min),
    "added in place": lambda s, m: s.add_(torch.zeros_like(s).masked_fill_(~m, -torch.inf)),
    "filled": lambda s, m: s.masked_fill(~m, -torch.inf),
    "where": lambda s, m: torch.where(m, s, torch.tensor(-1e9)),
    "multiplied": lambda s, m: s * m.to(s.dtype) - 1e4 * (1 - m.to(s.dtype)),
    "twice": lambda s, m: (s + torch.where(m, 0.0, -1e30)).masked_fill(~m, -1e30).clamp(min=-1e30),
    "maximum": lambda s, m: torch.max(s + (~m) * -1e30, torch.tensor(torch.finfo(s.dtype).min)),
}
SOFTMAXES: dict[str, Callable[[Tensor], Tensor]] = {
    "function": lambda s: F.softmax(s, dim=-1),
    "method": lambda s: s.softmax(-1),
    "last": lambda s: torch.softmax(s, 3),
    "fp32": lambda s: F.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype),
    "shifted": lambda s: (s - s.max(dim=-1, keepdim=True).values).softmax(-1),
    "shifted by amax": lambda s: (s - s.amax(-1, keepdim=True)).softmax(-1),
    "module": lambda s: torch.nn.Softmax(dim=-1)(s.float()).type_as(s),
}
WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "matmul": lambda w, v: w @ v,
    "dropout": lambda w, v: torch.matmul(F.dropout(w, p=0.1, training=False), v),
    "einsum": lambda w, v: torch.einsum("bhqk,bkhd->bqhd", w, v.transpose(1, 2)).transpose(1, 2),
    "bmm": lambda w, v: torch.bmm(w.flatten(0, 1), v.reshape(-1, *v.shape[2:])).view(*w.shape[:3], v.shape[3]),
    "guarded": lambda w, v: torch.nan_to_num(w) @ v,
}
TABLES: dict[str, dict[str, Any]] = {
    "product": PRODUCTS,
    "scale": SCALES,
    "mask": MASKS,
    "softmax": SOFTMAXES,
    "weights": WEIGHTS,
}


@dataclass(frozen=True)
class Spelling:
    """One way to write causal attention."""

    product: str = "matmul"
    scale: str = "times"
    mask: str = "added"
    softmax: str = "function"
    weights: str = "matmul"

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None) -> Tensor:
        rows = torch.arange(q.shape[2])
        mask = rows[None, :] <= rows[:, None]
        if padding is not None:
            mask = mask & padding[:, None, None, :]
        scores = SCALES[self.scale](q, k, PRODUCTS[self.product])
        weights = SOFTMAXES[self.softmax](MASKS[self.mask](scores, mask))
        return WEIGHTS[self.weights](weights, v)


def _same(spelling: Spelling, dynamic: bool | None) -> None:
    inputs = tuple(torch.randn(2, 3, 40, d, generator=torch.Generator().manual_seed(d)) for d in (16, 16, 24))
    result, out = rewritten(spelling, inputs, dynamic=dynamic)
    assert [(s.mask, s.score.text) for s in result.sites] == [(Causal(0), "")], [hit.words for hit in result.attentions]
    assert abs(result.sites[0].scale - SCALE) < 1e-6
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=SCALE)
    assert_close(out, expected)


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, table in TABLES.items() for name in table])
def test_every_spelling_of_a_part_is_the_same_site(part: str, name: str) -> None:
    _same(Spelling(**{part: name}), dynamic=False)


@settings(max_examples=20)
@given(st.builds(Spelling, **{part: st.sampled_from(sorted(table)) for part, table in TABLES.items()}), st.booleans())
def test_any_spelling_is_the_same_site(spelling: Spelling, dynamic: bool) -> None:
    _same(spelling, dynamic)


@settings(max_examples=30)
@given(st.builds(Spelling, **{part: st.sampled_from(sorted(table)) for part, table in TABLES.items()}), st.booleans())
def test_any_spelling_keeps_what_rows_without_a_key_give(spelling: Spelling, dynamic: bool) -> None:
    """The mean of all values under any finite score for hidden keys; 0 where the spelling itself gives NaN."""
    padding = torch.ones(2, 40, dtype=torch.bool)
    padding[0, :11] = False
    inputs = tuple(torch.randn(2, 3, 40, d, generator=torch.Generator().manual_seed(d)) for d in (16, 16, 24))
    result, out = rewritten(spelling, (*inputs, padding), dynamic=dynamic)
    assert [s.words for s in result.sites] == ["causal & padding"]
    assert_close(out, spelling(*inputs, padding).nan_to_num(0.0))
