"""CPU target: block-sparse attention out of PyTorch's own calls; memory grows linearly with the length."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from stem_compile import ops
from stem_compile.algebra import blocks, scores
from stem_compile.algebra.blocks import cdiv
from stem_compile.algebra.masks import decode
from stem_compile.kernels.contract import Kernels, Stopwatch
from stem_compile.kernels.targets.cpu import masses, pooling, rowwise, workers
from stem_compile.kernels.targets.cpu.gather import Problem, Span, dense
from stem_compile.kernels.targets.cpu.gather import attend as attend_run
from stem_compile.reasons import Reason
from stem_compile.selection import FULL, Attention, BlockSelection, SelectionSpec
from stem_compile.selection.tpd import everything, row_counts

LARGEST_HEAD = 1024
"""Head dims beyond are no attention that anybody has tried here."""
TALL = 1536
"""Queries of a span, all heads together. PyTorch's flash attention takes its largest tile from 768 on."""
NATIVE_BF16 = torch.backends.cpu.get_cpu_capability().startswith("AVX512") and torch.cpu._is_avx512_bf16_supported()
"""Whether bf16 products are faster than fp32 ones here. Elsewhere everything is computed in fp32, which is exacter too.
"""

_SHORT = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


def supports(attention: Attention) -> Reason | None:
    """None for every dtype of attention and every usual head dim."""
    if attention.q.dtype not in _SHORT:
        return Reason.DTYPE
    return Reason.HEAD_DIM if max(attention.q.shape[-1], attention.v.shape[-1]) > LARGEST_HEAD else None


def kernels(attention: Attention) -> Kernels:
    """What is pooled, and how: "gather" where blocks are alike but for causal edge and padding, else "rowwise"."""
    spec = attention.spec
    size = f"{spec.block_q}x{spec.block_k}"
    way = "rowwise" if _is_general(attention.mask_text, attention.score_text) else "gather"
    scored = "unscored" if everything(spec) else spec.pooling
    return Kernels(f"cpu {scored} {size}", f"cpu {way} {_SHORT[attention.q.dtype]} {size}")


def stopwatch(device: torch.device) -> Stopwatch | None:
    """None: a CPU is never measured, since other work on it would decide."""
    return None


@functools.lru_cache(maxsize=1024)
def _is_general(mask: str, score: str) -> bool:
    """Whether more than causal and padding decides, so that blocks are not alike."""
    parts = blocks.split(decode(mask))
    return bool(parts.others or parts.bands or scores.decode(score).modified)


def select(attention: Attention, kernel: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks to compute: indices int32 [B, H, query blocks, width] ascending, counts int32 [B, H, query blocks]."""
    counts = _counts(attention.candidates.sum(-1), attention.reach, attention.spec)
    shape = ops.selection_shape(attention.q, attention.k, attention.spec)
    if attention.spec.pooling == "mass" and int(counts.max()) > 0:
        return masses.ranked(attention, counts)
    if int(counts.max()) <= 0:
        indices = attention.q.new_zeros(shape, dtype=torch.int32)
    else:
        indices = pooling.ranked(attention, counts, int(shape[-1]))
    return indices, counts.expand(ops.counts_shape(attention.q, attention.spec)).contiguous()


def _counts(visible: torch.Tensor, reach: torch.Tensor | None, spec: SelectionSpec) -> torch.Tensor:
    """Lengths of the lists, int32, for rows with ``visible`` candidates. The layers of a model share them."""
    both = [visible] if reach is None else [visible, reach.expand(visible.shape)]
    return _counts_of(tuple(torch.stack(both).flatten().tolist()), (len(both), *visible.shape), spec)


@functools.lru_cache(maxsize=64)
def _counts_of(content: tuple[int, ...], shape: tuple[int, ...], spec: SelectionSpec) -> torch.Tensor:
    both = torch.tensor(content, dtype=torch.int64).view(shape)
    visible, reach = both[0], both[-1]
    return row_counts(visible, spec, reach)


def attend(
    attention: Attention, selection: BlockSelection, kernel: str, lse: torch.Tensor | None = None
) -> torch.Tensor:
    """Softmax attention over the visible keys of the selected blocks; a row without any gives 0.

    Result: [B, H, q_len, dv] in memory of ``ops.attention_output``. lse: [B, H, q_len], receives the log-sum-exp of
    each row's visible scores and its sink, -inf without any.
    """
    out = ops.attention_output(attention.q, attention.v)
    if attention.score.sink is not None and lse is None:
        lse = attention.q.new_empty(attention.shape[:3], dtype=torch.promote_types(attention.q.dtype, torch.float32))
    if kernel.startswith("cpu rowwise"):
        rowwise.attend(_problem(attention, selection, out, lse, plain=True), selection.counts, attention)
    else:

        def pieces() -> Iterator[tuple[Problem, Span]]:
            # Lazy, so that a worker plans: its small calls run alone instead of waiting for torch's other threads.
            problem = _problem(attention, selection, out, lse)
            for span in sorted(
                _spans(problem, selection.counts, attention.spec), key=lambda span: span.count is not None
            ):
                yield problem, span

        workers.run(lambda piece: attend_run(*piece), pieces())
    return out if lse is None or attention.score.sink is None else _with_sink(out, lse, attention)


def _with_sink(out: torch.Tensor, lse: torch.Tensor, attention: Attention) -> torch.Tensor:
    """Output and log-sum-exp with the sink joined: the output is scaled by the share of the softmax that the keys keep
    beside the sink. A row without visible keys stays 0."""
    sink = attention.score.sink_logits(attention.shape, attention.tensors, attention.scalars, lse)
    assert sink is not None
    out.mul_(torch.sigmoid(lse.unsqueeze(-1) - sink).to(out.dtype))
    torch.logaddexp(lse, sink.squeeze(-1), out=lse)
    return out


def _problem(
    attention: Attention, selection: BlockSelection, out: torch.Tensor, lse: torch.Tensor | None, plain: bool = False
) -> Problem:
    """What pieces of the attention share. plain: without the mask, which each piece evaluates itself."""
    q, spec, mask = attention.q, attention.spec, attention.mask
    batch, kv_len = attention.shape[0], attention.shape[3]
    dtype = q.dtype if NATIVE_BF16 and q.dtype == torch.bfloat16 else torch.promote_types(q.dtype, torch.float32)
    width = max(attention.k.shape[3], attention.v.shape[3])
    columns = cdiv(kv_len, spec.block_k)
    keys, values = (dense(x, dtype, width, columns * spec.block_k) for x in (attention.k, attention.v))
    problem = Problem(
        q=q,
        keys=keys,
        values=values,
        out=out,
        indices=selection.lists[..., : max(1, int(selection.counts.max()))],
        block_q=spec.block_q,
        block_k=spec.block_k,
        kv_len=kv_len,
        scale=attention.scale,
        offset=None if plain else mask.causal_offset,
        first=[0] * batch,
        lse=lse,
    )
    visible = None if plain else mask.visible
    if visible is not None and not bool(visible.all()):
        hidden = ~F.pad(visible.expand(batch, -1), (0, keys.shape[2] - kv_len))
        problem.bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
        # A bias does not hide what is NaN.
        problem.keys, problem.values = (x.masked_fill(hidden[:, None, :, None], 0) for x in (keys, values))
        per_block = hidden.unflatten(1, (columns, spec.block_k)).sum(-1)
        problem.first = (per_block == spec.block_k).int().cumprod(-1).sum(-1).tolist()
        problem.cut = F.pad(per_block.cumsum(-1), (1, 0)).tolist()
    return problem


def _spans(p: Problem, counts: torch.Tensor, spec: SelectionSpec) -> Iterator[Span]:
    """Cover all rows and heads by runs: heads of one key head together where their lists have one length."""
    batch, heads, rows = counts.shape
    group = heads // p.keys.shape[1]
    lengths, (prefixes, windows) = counts.tolist(), (x.tolist() for x in _edges(p, counts, spec))
    steps = [_step(p, row) for row in range(rows)]
    for b in range(batch):
        for start in range(0, heads, group):
            together = all(lengths[b][h] == lengths[b][start] for h in range(start, start + group))
            for some in (
                [range(start, start + group)] if together else [range(h, h + 1) for h in range(start, start + group)]
            ):
                chunk = -(-TALL // (len(some) * p.block_q))
                shapes = [
                    (
                        lengths[b][some[0]][i],
                        min(prefixes[b][h][i] for h in some),
                        min(windows[b][h][i] for h in some),
                        steps[i],
                    )
                    for i in range(rows)
                ]
                row = 0
                while row < rows:
                    stop = row + 1
                    while stop < min(rows, row + chunk) and shapes[stop] == shapes[row]:
                        stop += 1
                    count, prefix, window, _ = shapes[row]
                    yield Span(
                        b,
                        some,
                        range(row, stop),
                        None if count == FULL else count,
                        min(prefix, max(count - window, 0)),
                        window,
                    )
                    row = stop


def _step(p: Problem, row: int) -> tuple[int, ...]:
    """Equal for rows whose diagonals look the same, one row block and ``block_q`` keys further on."""
    height = min(p.block_q, p.q.shape[2] - row * p.block_q)
    if p.offset is None:
        return (height,)
    return height, *(limit - row * p.block_q for limit in p.limits(row)), row * p.block_q % p.block_k


def _edges(p: Problem, counts: torch.Tensor, spec: SelectionSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """(leading, trailing) listed blocks that need no gathering: [B, H, rows]. At most the forced ones, so that
    neighbouring rows agree."""
    listed = p.indices
    width = listed.shape[-1]
    most = torch.arange(min(spec.sinks, width))
    first = torch.tensor(p.first).view(-1, 1, 1, 1)
    prefix = ((listed[..., : len(most)] == first + most) & (most < counts.unsqueeze(-1))).int().cumprod(-1).sum(-1)
    if p.offset is None:
        return prefix, torch.zeros_like(prefix)
    spans = torch.tensor([p.columns(row) for row in range(counts.shape[2])])
    back = torch.arange(1, min(spec.locals, width) + 1)
    place = counts.unsqueeze(-1) - back
    trailing = listed.gather(-1, place.clamp(min=0).long())
    window = ((trailing == spans[:, 1:] - back) & (place >= 0)).int().cumprod(-1).sum(-1)
    # A window that leaves a diagonal block to the gathered part is none.
    window = window.masked_fill(window < spans[:, 1] - spans[:, 0], 0)
    # Nor does a prefix reach over the diagonal.
    return torch.minimum(prefix, (spans[:, 0] - first[..., 0]).clamp(min=0)), window
