"""``sparse_prefill``: against softmax in fp64 over the blocks it selected, and against itself under other packings."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stem_compile import OptionError, sparse_prefill
from stem_compile.selection import Observed, observe
from tests.numerics import assert_close

OPTIONS: dict[str, Any] = {"budget": 0.25, "block_size": 64, "min_length": 0, "sink_blocks": 1, "local_blocks": 1}
HEADS, KEY_HEADS, DIM = 4, 2, 16


def tensors(queries: int, keys: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (queries, HEADS), (keys, KEY_HEADS), (keys, KEY_HEADS)
    return tuple(torch.randn(*shape, DIM, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


def starts(lengths: list[int]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    kwargs = {"options": OPTIONS} | kwargs
    return sparse_prefill(q, k, v, cu_seqlens_q=[0, len(q)], cu_seqlens_k=[0, len(k)], **kwargs)


def watched(*args: Any, **kwargs: Any) -> tuple[tuple[torch.Tensor, torch.Tensor], list[torch.Tensor]]:
    """(result, computed blocks of each sparse piece, [heads, rows, key blocks])."""
    blocks: list[torch.Tensor] = []

    def keep(observed: Observed) -> None:
        blocks.append(observed.selection.dense(observed.candidates)[0])

    with observe(keep):
        return one(*args, **kwargs), blocks


def paged(
    k: torch.Tensor, lengths: list[int], page: int, seed: int, head_major: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(pages in random order among pages of NaN, table [n, width] with garbage past each row's pages)."""
    generator = torch.Generator().manual_seed(seed)
    used = [-(-n // page) for n in lengths]
    count, width = sum(used) + 3, max([*used, 0]) + 2
    order = torch.randperm(count, generator=generator).tolist()
    cache = torch.full((count, page, *k.shape[1:]), torch.nan, dtype=k.dtype)
    table = torch.full((len(lengths), width), 10**6, dtype=torch.int32)
    for row, (n, first) in enumerate(zip(lengths, starts(lengths), strict=False)):
        for i in range(used[row]):
            part = k[first + i * page : first + min(n, (i + 1) * page)]
            table[row, i] = order.pop()
            cache[int(table[row, i]), : len(part)] = part
    return cache.transpose(1, 2).contiguous().transpose(1, 2) if head_major else cache, table


def oracle(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor | None, scale: float,
    window: int | None, sinks: torch.Tensor | None, softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Softmax in fp64 over the visible keys of the blocks of 64; None is all of them."""
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(HEADS // KEY_HEADS, 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1] - torch.arange(k.shape[1])
    shown = (distance >= 0) & (distance < (window or k.shape[1]))
    if blocks is not None:
        whole = blocks.repeat_interleave(64, 1).repeat_interleave(64, 2)
        shown = shown & whole[:, : q.shape[1], : k.shape[1]]
    scores = scores.masked_fill(~shown, -torch.inf)
    total = scores.logsumexp(-1)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.double()[:, None])
    return ((scores - total[..., None]).exp() @ v).transpose(0, 1), total.transpose(0, 1)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"scale": 0.4},
    {"window": 100},
    {"softcap": 2.0},
    {"sinks": torch.linspace(-1, 2, HEADS)},
    {"window": 200, "softcap": 3.0, "sinks": torch.linspace(1, -1, HEADS)},
]


@pytest.mark.parametrize("budget", [0.25, 1.0])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v) or "plain")
def test_result_is_softmax_over_the_selected_blocks(variant: dict[str, Any], budget: float) -> None:
    q, k, v = tensors(700, 700)
    (out, lse), blocks = watched(q, k, v, options=OPTIONS | {"budget": budget}, **variant)
    settings_ = {"scale": DIM**-0.5, "window": None, "sinks": None, "softcap": None} | variant
    expected = oracle(q, k, v, blocks[0], **settings_)
    if budget == 1.0:
        expected = oracle(q, k, v, None, **settings_)
    elif "window" not in variant:
        assert blocks[0].sum() < 0.9 * torch.ones(700 // 64 + 1, 700 // 64 + 1).tril().sum() * HEADS
    assert_close((out, lse), expected, computed=torch.float32)


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=4),
    page=st.sampled_from([16, 24, 64, 128, 256]),
    seed=st.integers(0, 100),
    head_major=st.booleans(),
    window=st.sampled_from([None, 90]),
)
def test_packed_and_paged_are_one_by_one(
    lengths: list[int], page: int, seed: int, head_major: bool, window: int | None
) -> None:
    q, k, v = tensors(sum(lengths), sum(lengths), seed)
    cu = starts(lengths)
    both = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "window": window, "options": OPTIONS}
    out, lse = sparse_prefill(q, k, v, **both)
    for low, high in itertools.pairwise(cu):
        alone = one(q[low:high], k[low:high], v[low:high], window=window)
        assert torch.equal(out[low:high], alone[0]) and torch.equal(lse[low:high], alone[1])
    caches = [paged(x, lengths, page, seed, head_major) for x in (k, v)]
    pages = sparse_prefill(q, caches[0][0], caches[1][0], block_table=caches[0][1], **both)
    assert torch.equal(pages[0], out) and torch.equal(pages[1], lse)


@settings(max_examples=15, deadline=None)
@given(length=st.integers(65, 700), cuts=st.lists(st.integers(1, 10), max_size=3), seed=st.integers(0, 100))
def test_chunks_of_whole_blocks_are_one_shot(length: int, cuts: list[int], seed: int) -> None:
    q, k, v = tensors(length, length, seed)
    (out, lse), whole = watched(q, k, v)
    edges = sorted({0, length, *(c * 64 for c in cuts if c * 64 < length)})
    for low, high in itertools.pairwise(edges):
        part, blocks = watched(q[low:high], k[:high], v[:high], prompt_lengths=[length])
        assert torch.equal(blocks[0], whole[0][:, low // 64 : -(-high // 64), : -(-high // 64)])
        assert_close(part, (out[low:high], lse[low:high]))


def test_blocks_that_a_chunk_cuts_are_dense_and_the_others_are_one_shots() -> None:
    q, k, v = tensors(640, 640)
    (out, _), _ = watched(q, k, v)
    dense, _ = one(q, k, v, options=OPTIONS | {"budget": 1.0})
    part, blocks = watched(q[200:500], k[:500], v[:500], prompt_lengths=[640])
    assert torch.allclose(part[0][56:248], out[256:448]) and not torch.allclose(out, dense)
    assert [b.shape[1] for b in blocks] == [3]
    for low, high in ((0, 56), (248, 300)):
        assert torch.allclose(part[0][low:high], dense[200 + low : 200 + high])


def test_short_prompts_and_decoding_are_dense_in_the_same_call() -> None:
    lengths, keys = [300, 1, 640], [300, 200, 640]
    q, k, v = tensors(sum(lengths), sum(keys))
    blocks = []
    with observe(lambda observed: blocks.append(observed.attention.q.shape[2])):
        out, _ = sparse_prefill(
            q, k, v, cu_seqlens_q=starts(lengths), cu_seqlens_k=starts(keys), prompt_lengths=[300, 150, 640],
            options=OPTIONS | {"min_length": 512},
        )  # fmt: skip
    assert blocks == [640]
    expected, _ = oracle(q[300:301], k[300:500], v[300:500], None, DIM**-0.5, None, None, None)
    assert_close(out[300:301], expected, computed=torch.float32)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_dtypes(dtype: torch.dtype, error: float) -> None:
    q, k, v = tensors(300, 300, dtype=dtype)
    (out, lse), blocks = watched(q, k, v)
    expected = oracle(q, k, v, blocks[0], DIM**-0.5, None, None, None)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert (out.double() - expected[0]).norm() < error * expected[0].norm()
    assert (lse.double() - expected[1]).abs().max() < error


def test_out_is_written_and_rows_past_the_end_are_empty() -> None:
    q, k, v = tensors(100, 100)
    buffer = torch.full((100, HEADS, DIM), torch.nan, dtype=q.dtype)
    out, lse = sparse_prefill(q, k, v, cu_seqlens_q=[0, 80], cu_seqlens_k=[0, 80], options=OPTIONS, out=buffer)
    assert out is buffer and torch.equal(out[:80], one(q[:80], k[:80], v[:80])[0])
    assert not out[80:].any() and (lse[80:] == -torch.inf).all()


def _wrong() -> list[Any]:
    q, k, v = tensors(64, 64)
    cache, table = paged(k, [64], 16, 0)
    cu: dict[str, Any] = {"cu_seqlens_q": [0, 64], "cu_seqlens_k": [0, 64], "q": q, "k": k, "v": v}
    pages = cu | {"k": cache, "v": cache, "block_table": table}
    outside = table.clone()
    outside[0, 1] = 7
    both = torch.zeros(64, 6, DIM, dtype=q.dtype)
    return [
        pytest.param(pages | {"block_table": outside}, "names page 7 .* pages are 0 to 6", id="page past the end"),
        pytest.param(pages | {"block_table": -table}, "names page -", id="negative page"),
        pytest.param(pages | {"block_table": table[:, :3]}, "too narrow: 64 keys of sequence 0 fill 4", id="narrow"),
        pytest.param(pages | {"block_table": table.float()}, r"integers \[1, width\]", id="table of floats"),
        pytest.param(pages | {"block_table": table[0]}, r"integers \[1, width\]", id="table of one dimension"),
        pytest.param(pages | {"k": cache[:, :8], "v": cache[:, :8]}, "holds 8 tokens, 16 to 256", id="small pages"),
        pytest.param(cu | {"cu_seqlens_q": [0, 40, 30]}, "falls from 40 to 30 at sequence 1", id="shrinks"),
        pytest.param(cu | {"cu_seqlens_q": [1, 64]}, "from 0 on", id="not from 0"),
        pytest.param(cu | {"cu_seqlens_q": [0, 65]}, "ends at 65, and there are 64", id="past the end"),
        pytest.param(cu | {"cu_seqlens_q": torch.tensor([0.0, 64])}, "integers in one dimension", id="float lengths"),
        pytest.param(cu | {"cu_seqlens_k": [0, 30, 64]}, "1 sequences and cu_seqlens_k 2", id="other number"),
        pytest.param(cu | {"cu_seqlens_k": [0, 63]}, "64 queries and 63 keys", id="few keys"),
        pytest.param(cu | {"prompt_lengths": [-1]}, "none negative", id="negative prompt"),
        pytest.param(cu | {"prompt_lengths": [64, 64]}, "1 lengths", id="other number of prompts"),
        pytest.param(cu | {"k": k.float()}, "share dtype and device", id="mixed dtypes"),
        pytest.param(cu | {"k": k[..., :8]}, "same head dim", id="other head dim"),
        pytest.param(cu | {"q": q[:, :3]}, "3 query heads and 2 key heads", id="heads"),
        pytest.param(cu | {"k": cache, "v": cache}, "without a block_table", id="pages without table"),
        pytest.param({**cu, **{n: x.int() for n, x in (("q", q), ("k", k), ("v", v))}}, "int32", id="dtype"),
        pytest.param({**cu, **{n: x.repeat(1, 1, 65) for n, x in (("q", q), ("k", k), ("v", v))}}, "1040", id="wide"),
        pytest.param(cu | {"sinks": torch.zeros(3)}, r"\[4\] on cpu", id="sinks"),
        pytest.param(cu | {"window": 0}, "window=0", id="window"),
        pytest.param(cu | {"softcap": -1.0}, "softcap=-1.0", id="softcap"),
        pytest.param(cu | {"out": torch.zeros(64, 4, 8)}, "out is", id="out"),
        pytest.param(cu | {"out": q}, "shares memory with q", id="out is q"),
        pytest.param(cu | {"v": both[:, :2], "out": both[:, 2:]}, "shares memory with v", id="out beside v"),
        pytest.param(cu | {"options": {"budget": (0.5, 0.2)}}, "one layer", id="budgets by layer"),
        pytest.param(cu | {"options": {"prompt_length": 9}}, "prompt_lengths=", id="prompt length"),
        pytest.param(cu | {"q": q.clone().requires_grad_()}, "no backward", id="gradients"),
    ]


@pytest.mark.parametrize(("arguments", "message"), _wrong())
def test_bad_input_is_one_clear_error_before_anything_is_computed(
    arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*args: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr("stem_compile.serving.packed._computed", computed)
    q, k, v = (arguments[name] for name in ("q", "k", "v"))
    rest = {name: value for name, value in arguments.items() if name not in ("q", "k", "v")}
    with pytest.raises(ValueError, match=message) as raised:
        sparse_prefill(q, k, v, **rest)
    assert isinstance(raised.value, OptionError) == ("options" in arguments)


def test_nothing_is_nothing() -> None:
    q, k, v = tensors(0, 0)
    out, lse = sparse_prefill(q, k, v, cu_seqlens_q=[0, 0, 0], cu_seqlens_k=[0, 0, 0], options=OPTIONS)
    assert out.shape == (0, HEADS, DIM) and lse.shape == (0, HEADS)
