"""What is decided from options and lengths: chunks of a longer prompt select as one shot does, or not at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stem_compile import selection
from stem_compile.passes.graph.sites import Rejected
from stem_compile.reasons import Reason
from stem_compile.selection import Attention
from tests.passes.capture import rewritten

LENGTH, BLOCK = 1024, 64


def chunk(x: torch.Tensor, begin: int) -> torch.Tensor:
    """Causal attention of the tokens from ``begin`` on to all."""
    rows = torch.arange(begin, x.shape[2])
    return F.scaled_dot_product_attention(x[:, :, begin:], x, x, attn_mask=torch.arange(x.shape[2]) <= rows[:, None])


def run(x: torch.Tensor, begin: int, **options: Any) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
    """(what became of the attention, the result, the blocks computed)."""
    lists: list[torch.Tensor] = []
    with selection.observe(lambda observed: lists.append(observed.selection.dense(observed.candidates))):
        result, out = rewritten(
            lambda x: chunk(x, begin), (x,), budget=0.25, block_size=BLOCK, prompt_length=LENGTH, **options
        )
    return result, out, lists


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("cuts", [(512,), (320, 640), (64, 128, 960)])
def test_chunks_of_whole_blocks_select_as_one_shot_does(cuts: tuple[int, ...], pooling: str) -> None:
    x = torch.randn(1, 2, LENGTH, 16)
    _, whole, (blocks,) = run(x, 0, pooling=pooling)
    for begin, end in zip((0, *cuts), (*cuts, LENGTH)):
        _, out, (part,) = run(x[:, :, :end], begin, pooling=pooling)
        assert torch.equal(part, blocks[:, :, begin // BLOCK : end // BLOCK, : end // BLOCK])
        torch.testing.assert_close(out, whole[:, :, begin:end])


@pytest.mark.parametrize(
    ("begin", "end", "detail"),
    [
        (0, 500, "it ends at token 500, block_size is 64"),
        (500, LENGTH, "it begins at token 500, block_size is 64"),
        (512, 600, "it ends at token 600"),
        (500, 600, "it begins at token 500"),
    ],
)
def test_a_chunk_that_cuts_a_block_is_refused(begin: int, end: int, detail: str) -> None:
    x = torch.randn(1, 2, end, 16)
    result, out, lists = run(x, begin)
    (hit,) = result.attentions
    assert isinstance(hit, Rejected) and hit.reason is Reason.CHUNK
    assert detail in hit.words and "multiple of block_size" in hit.words
    assert not lists
    torch.testing.assert_close(out, chunk(x, begin))


def test_only_selections_can_be_cut() -> None:
    x = torch.randn(1, 2, 600, 16)
    for options in ({"budget": 1.0}, {"policy": "dense"}):
        given = {"budget": 0.25, "block_size": BLOCK, "prompt_length": LENGTH, **options}
        result, out = rewritten(lambda x: chunk(x, 500), (x,), **given)
        assert len(result.sites) == 1
        torch.testing.assert_close(out, chunk(x, 500))


def test_the_last_chunk_may_end_anywhere() -> None:
    x = torch.randn(1, 2, 1000, 16)
    result, _ = rewritten(lambda x: chunk(x, 512), (x,), budget=0.25, block_size=BLOCK, prompt_length=1000)
    assert len(result.sites) == 1


def test_a_place_known_at_run_time_only_is_refused() -> None:
    def after(x: torch.Tensor, begin: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(512) + begin
        return F.scaled_dot_product_attention(x[:, :, :512], x, x, attn_mask=torch.arange(1024) <= rows[:, None])

    x = torch.randn(1, 2, 1024, 16)
    result, _ = rewritten(after, (x, torch.tensor(512)), budget=0.25, block_size=BLOCK, prompt_length=LENGTH)
    assert [hit.reason for hit in result.attentions] == [Reason.CHUNK]
    result, _ = rewritten(after, (x, torch.tensor(512)), budget=0.25, block_size=BLOCK)
    assert len(result.sites) == 1


def test_symbolic_lengths_are_asked_by_their_remainder() -> None:
    from stem_compile import backend

    graphs: list[Any] = []
    options = {"budget": 0.25, "block_size": BLOCK, "min_length": 1, "prompt_length": 4096, "inner": "eager"}
    torch._dynamo.reset()
    with torch.no_grad(), backend.listen(graphs.append):
        compiled = torch.compile(
            lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
            backend="stem",
            options=options,
            dynamic=True,
        )
        for length in (640, 704, 1280, 700, 650, 1920, 999):
            x = torch.randn(1, 2, length, 16)
            assert compiled(x).isfinite().all()
    assert [len(graph.sites) for graph in graphs] == [1, 0]


def test_an_attention_value_tells_where_its_mask_reaches() -> None:
    x = torch.randn(1, 2, 256, 16)
    attention = Attention(x, x, x, "(kv <= q) & (kv > q - 100)", spec_text="block_q=64,block_k=64")
    assert attention.candidates.sum(-1).tolist() == [[[1, 2, 3, 3]]]
    assert attention.reach is not None and attention.reach.tolist() == [[[1, 2, 3, 4]]]
