"""What is written in place between its reading and the attention is not believed, through whatever view it is
written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stem_compile.passes.graph import memory, schemas
from stem_compile.passes.graph.sites import AttentionSite, Rejected
from stem_compile.reasons import Reason
from tests.numerics import assert_close
from tests.passes.capture import graph_of, rewritten

Tensor = torch.Tensor
N = 70

# Ways to change a mask m [N, N] in place, each through another kind of view.
WRITES: dict[str, Callable[[Tensor], Any]] = {
    "setitem": lambda m: m.__setitem__((slice(None), 7), False),
    "diagonal": lambda m: m.diagonal(-5).fill_(False),
    "torch.diagonal": lambda m: torch.diagonal(m, offset=-5).fill_(False),
    "transposed": lambda m: m.T[7].fill_(False),
    "as_strided": lambda m: m.as_strided((N - 5,), (N + 1,), 5 * N).zero_(),
    "unfold": lambda m: m.unfold(0, 10, 10)[3].zero_(),
    "chunk": lambda m: m.chunk(2, dim=1)[0][40:].zero_(),
    "tensor_split": lambda m: m.tensor_split(2, dim=1)[0][40:].zero_(),
    "out": lambda m: torch.logical_and(m, torch.arange(N) != 9, out=m),
    "copy": lambda m: m.copy_(m & (torch.arange(N) != 9)),
}


@pytest.mark.parametrize("name", WRITES)
def test_a_mask_written_through_a_view_is_not_believed(name: str) -> None:
    def model(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(N, N, dtype=torch.bool).tril()
        WRITES[name](mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    _right(model)


def by_hand(q: Tensor, k: Tensor, v: Tensor, after_product: Any = None, after_softmax: Any = None) -> Tensor:
    scores = q @ k.transpose(-1, -2) * 0.25
    if after_product is not None:
        after_product(q, k, v)
    weights = scores.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    if after_softmax is not None:
        after_softmax(weights, scores)
    return weights @ v


def double(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, 1)


# Models that write what an attention has read, or what it is about to read.
MODELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "queries after their product": lambda q, k, v: by_hand(q * 1, k, v, lambda q, k, v: q.zero_()),
    "keys after their product": lambda q, k, v: by_hand(q, k * 1, v, lambda q, k, v: k[:, :, 3:].zero_()),
    "a cache of keys after its product": lambda q, k, v: by_hand(q, k, v, lambda q, k, v: k.copy_(k.roll(1, 2))),
    "values before the weights": lambda q, k, v: by_hand(q, k, v * 1, lambda q, k, v: v.transpose(1, 2).mul_(2)),
    "weights": lambda q, k, v: by_hand(q, k, v, None, lambda w, s: w.__setitem__((slice(None), slice(None), 5), 0)),
    "weights through a view": lambda q, k, v: by_hand(q, k, v, None, lambda w, s: w.view(-1)[::7].zero_()),
    "weights scaled": lambda q, k, v: by_hand(q, k, v, None, lambda w, s: w.mul_(0.5)),
    "scores after the softmax": lambda q, k, v: by_hand(q, k, v, None, lambda w, s: s.zero_()),
    "the source of a copy": lambda q, k, v: _copied(q, k, v, lambda k: k.zero_()),
    "the source of a copy by inplace=True": lambda q, k, v: _copied(q, k, v, lambda k: F.relu(k, inplace=True)),
    "the source of a copy by inplace, unnamed": lambda q, k, v: _copied(q, k, v, lambda k: F.relu(k, True)),
    "the diagonal of a copy's source": lambda q, k, v: _copied(q, k, v, lambda k: k.diagonal(dim1=2, dim2=3).zero_()),
}


def _copied(q: Tensor, k: Tensor, v: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    k = k[:, :2] * 1
    wide = double(k)
    write(k)
    return F.scaled_dot_product_attention(q, wide, double(v[:, :2]), is_causal=True) + k.sum()


@pytest.mark.parametrize("name", MODELS)
def test_what_an_attention_read_is_not_read_again(name: str) -> None:
    _right(MODELS[name])


def _right(model: Callable[..., Tensor]) -> list[Any]:
    inputs = tuple(torch.randn(2, 4, N, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    result, out = rewritten(model, tuple(x.clone() for x in inputs))
    assert_close(out, model(*(x.clone() for x in inputs)))
    return result.attentions


def test_a_write_is_told_with_a_way_out() -> None:
    (hit,) = _right(MODELS["queries after their product"])
    assert hit.reason is Reason.WRITTEN
    assert "out of place" in hit.words


# Masks that are made in place, of memory that nobody else sees.
IN_PLACE: dict[str, Callable[[], Tensor]] = {
    "added": lambda: torch.full((N, N), -torch.inf).triu(1).add_(torch.zeros(N, N)),
    "iadd": lambda: _sum(torch.full((N, N), -torch.inf).triu(1), torch.full((N, N), -torch.inf).tril(-N)),
    "tril_": lambda: torch.ones(N, N, dtype=torch.bool).tril_(),
    "and": lambda: (torch.arange(N)[None, :] <= torch.arange(N)[:, None]).logical_and_(torch.ones(N, dtype=torch.bool)),
    "filled": lambda: torch.empty(2 * N, 2 * N).fill_(-torch.inf).triu_(1)[:N, :N],
    "zeroed": lambda: torch.empty(N, N).zero_().masked_fill_(torch.ones(N, N, dtype=torch.bool).triu(1), -1e9),
}


def _sum(a: Tensor, b: Tensor) -> Tensor:
    a += b
    return a


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_mask_written_in_place_is_read(name: str) -> None:
    (hit,) = _right(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=IN_PLACE[name]()))
    assert isinstance(hit, AttentionSite)
    assert hit.words == "causal" if name != "iadd" else "causal" in hit.words
    assert hit.tensors == []


def test_operators_tell_what_they_write() -> None:
    with torch.library._scoped_library("stem_tests", "DEF") as library:
        library.define("swap(Tensor a, Tensor(a!) b) -> ()")
        library.impl("swap", lambda a, b: [b.copy_(a)][1:] or None, "CompositeExplicitAutograd")
        torch.library.register_fake("stem_tests::swap", lambda a, b: None, lib=library)

        def model(x: Tensor) -> Tensor:
            y = x + 1
            torch.ops.stem_tests.swap(x, y)
            return y

        graph = graph_of(model, (torch.ones(3),)).graph
    assert [[n.name for n in memory.written(node)] for node in graph.nodes if memory.mutates(node)] == [["y"]]


WRITERS: dict[str, Any] = {
    "_foreach_zero_": lambda x: torch._foreach_zero_([x]),
    "_foreach_mul_": lambda x: torch._foreach_mul_([x, x.clone()], 2.0),
    "_foreach_copy_": lambda x: torch._foreach_copy_([x], [x + 1]),
    "a packet of an ATen operator": lambda x: torch.ops.aten.add_(x, 1.0),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_mask_that_any_operator_writes_is_not_believed(name: str) -> None:
    """Which argument is written is read from the operators' schemas."""

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(q.shape[2])
        mask = torch.where(rows[None, :] <= rows[:, None], 0.0, -1e9)
        WRITERS[name](mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    inputs = tuple(torch.randn(1, 2, 40, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    result, out = rewritten(model, inputs)
    assert [h.reason for h in result.attentions if isinstance(h, Rejected)] == [Reason.WRITTEN]
    torch.testing.assert_close(out, model(*inputs))


def test_what_every_operator_writes_can_be_asked() -> None:
    """Of all ATen operators, those with lists as defaults too."""
    names = {schema.name.removeprefix("aten::") for schema in torch._C._jit_get_all_schemas()}
    written = {name for name in names if schemas.written_arguments(schemas.overloads(name), (None,) * 20, {})}
    assert {"add_", "index_put_", "_foreach_add_", "amax"} <= names
    assert {"add_", "index_put_", "_foreach_add_"} <= written
