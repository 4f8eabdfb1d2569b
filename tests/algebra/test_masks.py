"""The algebra: text round trips, block classification is sound, candidates are exact, and masks refuse to be truth
values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from stem_compile.algebra import blind, blocks, masks, symbolic
from stem_compile.algebra.masks import Block, Causal, Full, Mask, Padding
from stem_compile.algebra.symbolic import KV, Q
from tests.strategies import Case, cases, terms

SHAPE = (2, 1, 37, 45)
KEEP = torch.rand(2, 45, generator=torch.Generator().manual_seed(3)) < 0.6


def dense(mask: Mask, rows: slice = slice(None)) -> torch.Tensor:
    wanted = len(range(*rows.indices(SHAPE[2])))
    return mask.dense(SHAPE, [KEEP], rows=rows).expand(2, 1, wanted, 45)


def test_a_mask_is_no_truth_value() -> None:
    with pytest.raises(TypeError, match="combine masks with &"):
        bool(Causal() and Full())


@given(terms())
def test_text_round_trips(mask: Mask) -> None:
    assert masks.encode(masks.decode(masks.encode(mask))) == masks.encode(mask)
    assert torch.equal(dense(masks.decode(masks.encode(mask))), dense(mask))


@given(terms(), terms())
def test_combinators_are_elementwise(a: Mask, b: Mask) -> None:
    assert torch.equal(dense(a & b), dense(a) & dense(b))
    assert torch.equal(dense(a | b), dense(a) | dense(b))
    assert torch.equal(dense(~a), ~dense(a))


@given(terms(), st.integers(0, 36), st.integers(1, 20), st.integers(0, 44), st.integers(1, 20))
def test_classification_is_sound(mask: Mask, row: int, rows: int, key: int, keys: int) -> None:
    row_end, key_end = min(row + rows, 37), min(key + keys, 45)
    kind = mask.classify((row, row_end), (key, key_end), SHAPE)
    block = dense(mask)[:, :, row:row_end, key:key_end]
    assert kind is not Block.FULL or block.all()
    assert kind is not Block.EMPTY or not block.any()


@pytest.mark.parametrize(
    ("rows", "keys", "expected"),
    [((0, 8), (8, 16), Block.EMPTY), ((8, 16), (8, 16), Block.PARTIAL), ((8, 16), (0, 8), Block.FULL)],
)
def test_causal_blocks_are_told_exactly(rows: tuple[int, int], keys: tuple[int, int], expected: Block) -> None:
    assert Causal().classify(rows, keys, SHAPE) is expected


@given(terms())
def test_rows_are_a_slice_of_the_whole(mask: Mask) -> None:
    assert torch.equal(dense(mask, slice(5, 20)), dense(mask)[:, :, 5:20])


def test_conjuncts_get_their_names() -> None:
    load = symbolic.tensor(0)(symbolic.B, KV)
    mask = masks.predicate(sympy.And(sympy.Ne(load, 0), sympy.Ge(Q + 5, KV)))
    assert mask == Causal(5) & Padding(0)
    assert mask.words == "causal(offset=5) & padding"
    assert masks.predicate(KV < Q + 1) == Causal(0)
    assert masks.predicate(Q - KV >= 0).words == "causal"


@dataclass(frozen=True)
class Prefix(Mask):
    """A term from outside the package: the first ``size`` keys."""

    size: int
    is_interval: ClassVar[bool] = True

    @classmethod
    def recognise(cls, expr: Any) -> Mask | None:
        bound = expr.rhs if isinstance(expr, sympy.Lt) and expr.lhs == KV else sympy.nan
        return cls(int(bound)) if bound.is_Integer else None

    @property
    def predicate(self) -> Any:
        return sympy.Lt(KV, self.size)

    @property
    def far(self) -> Any:
        return sympy.Integer(0)

    @property
    def near(self) -> Any:
        return sympy.Integer(self.size - 1)

    @property
    def words(self) -> str:
        return f"the first {self.size} keys"


@pytest.fixture
def prefix() -> Iterator[None]:
    masks.register(Prefix)
    yield
    masks.unregister(Prefix)


def test_a_term_from_outside_is_named_and_its_geometry_used(prefix: None) -> None:
    mask = masks.decode("(kv <= q) & (kv < 20)")
    assert mask.words == "causal & the first 20 keys"
    assert blocks.split(mask).bands == (Prefix(20),)
    assert masks.decode("(kv <= q) | (kv < 20)").words == "causal | the first 20 keys"
    visible = dense(mask)
    possible = blocks.candidates(mask, SHAPE, [], [], 16, 16, "cpu").expand(2, 1, 3, 3)
    padded = torch.nn.functional.pad(visible, (0, 3, 0, 11))
    assert (possible | ~padded.unflatten(3, (3, 16)).unflatten(2, (3, 16)).any(5).any(3)).all()
    assert torch.equal(blind.blind_rows(mask, SHAPE, [], [], torch.device("cpu"))[..., 0], ~visible.any(-1))
    with pytest.raises(ValueError, match="Prefix is registered already"):
        masks.register(Prefix)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0.02*q - 0.02*kv <= 0.5", "[-0.02*kv + 0.02*q <= 0.5]"),
        ("q - kv < 20.5", "[-kv + q < 20.5]"),
        ("kv < q + 1/2", "causal"),
        ("3*kv <= 3*q", "causal"),
        ("kv/3 <= q/3", "causal"),
        ("2*kv < 2*q + 1", "causal"),
        ("kv <= q + T0(b)", "[kv <= q + T0(b)]"),
    ],
)
def test_only_whole_numbers_make_an_edge(text: str, words: str) -> None:
    assert masks.decode(text).words == words


def test_text_that_is_no_mask_is_refused() -> None:
    with pytest.raises(ValueError, match="not an encoded mask"):
        masks.decode("kv <=")


@given(cases(), st.sampled_from((16, 64)), st.sampled_from((16, 32)))
def test_candidates_are_exact(case: Case, block_q: int, block_k: int) -> None:
    mask, tensors = case.mask()
    possible = blocks.candidates(mask, case.shape, tensors, [], block_q, block_k, "cpu").expand(
        case.batch, case.shape[1], -1, -1
    )
    visible = mask.dense(case.shape, tensors).expand(case.shape)
    rows, columns = blocks.cdiv(case.q_len, block_q), blocks.cdiv(case.shape[3], block_k)
    padded = torch.nn.functional.pad(visible, (0, columns * block_k - case.shape[3], 0, rows * block_q - case.q_len))
    expected = padded.unflatten(3, (columns, block_k)).unflatten(2, (rows, block_q)).any(5).any(3)
    assert torch.equal(possible, expected)


@given(st.integers(-50, 50), st.integers(1, 9), st.integers(-5, 5))
def test_bounds_contain_every_value(low: int, width: int, factor: int) -> None:
    expr = factor * Q - symbolic.FloorDiv(KV, 3) + sympy.Mod(Q, 4) + sympy.Min(Q, KV)
    box = {Q: (max(low, 0), max(low, 0) + width), KV: (0, width)}
    least, most = symbolic.bounds(expr, box)
    q = torch.arange(box[Q][0], box[Q][1] + 1)[:, None]
    value = symbolic.evaluate(expr, {Q: q, KV: torch.arange(width + 1)[None, :]})
    assert least <= int(value.min())
    assert int(value.max()) <= most
