"""CPU target: block-sparse attention out of PyTorch's own calls; memory grows linearly with the length."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from stem_compile import ops
from stem_compile.algebra import blocks, scores
from stem_compile.algebra.masks import Full, Mask, decode
from stem_compile.kernels.targets.cpu import pooling, rowwise, workers
from stem_compile.kernels.targets.cpu.gather import Problem, Run, dense
from stem_compile.kernels.targets.cpu.gather import attend as attend_run
from stem_compile.selection import FULL, SelectionSpec, parse, policies
from stem_compile.selection.tpd import full_rows, row_limits

Tensors = Sequence[torch.Tensor]

HEAD_DIMS = range(1, 1025)
TALL = 1536
"""Queries of a run, all heads together. PyTorch's flash attention takes its largest tile from 768 on."""
NATIVE_BF16 = torch.backends.cpu.get_cpu_capability().startswith("AVX512") and torch.cpu._is_avx512_bf16_supported()
"""Whether bf16 products are faster than fp32 ones here. Elsewhere everything is computed in fp32, which is exacter too.
"""

_SHORT = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


def kernel_name(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: str, spec: str, score: str = "") -> str:
    """Name of what ``attend`` runs for (fake) tensors; ``ops.REFERENCE`` for dtypes it has nothing for."""
    if q.dtype not in _SHORT:
        return ops.REFERENCE
    chosen = parse(spec)
    return (
        f"cpu {'rowwise' if _is_general(mask, score) else 'gather'} {_SHORT[q.dtype]} {chosen.block_q}x{chosen.block_k}"
    )


@functools.lru_cache(maxsize=1024)
def _is_general(mask: str, score: str) -> bool:
    """Whether more than causal and padding decides, so that blocks are not alike."""
    parts = blocks.split(decode(mask))
    return bool(parts.others or parts.bands or scores.decode(score).modified)


def select_name(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: str, spec: str) -> str:
    """Name of what ``select`` runs."""
    chosen = parse(spec)
    return (
        f"cpu {chosen.pooling if policies.get(chosen.policy).SCORED else 'unscored'} {chosen.block_q}x{chosen.block_k}"
    )


def select(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tensors: Tensors,
    scalars: Sequence[int],
    mask: str,
    scale: float,
    spec: str,
    kernel: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks to compute: indices int32 [B, H, query blocks, width] ascending, counts int32 [B, H, query blocks]."""
    chosen, meaning = parse(spec), decode(mask)
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    found = blocks.candidates(meaning, shape, tensors, scalars, chosen.block_q, chosen.block_k, q.device)
    reach = None
    if blocks.split(meaning).bands:
        reach = blocks.candidates(
            blocks.unbanded(meaning), shape, tensors, scalars, chosen.block_q, chosen.block_k, q.device
        ).sum(-1)
    counts = _counts(found.sum(-1), reach, chosen)
    width = int(ops.selection_shape(q, k, chosen)[3])
    if int(counts.max()) <= 0:
        indices = q.new_zeros(*shape[:2], found.shape[2], width, dtype=torch.int32)
    else:
        seen = blocks.key_visible(meaning, shape, tensors, scalars, q.device)
        indices = pooling.ranked(q, k, v, seen, found, counts, width, chosen, scale)
    return indices, counts.expand(shape[0], shape[1], -1).contiguous()


def _counts(visible: torch.Tensor, reach: torch.Tensor | None, spec: SelectionSpec) -> torch.Tensor:
    """Lengths of the lists, int32, for rows with ``visible`` candidates. The layers of a model share them."""
    both = [visible] if reach is None else [visible, reach.expand(visible.shape)]
    return _counts_of(tuple(torch.stack(both).flatten().tolist()), (len(both), *visible.shape), spec)


@functools.lru_cache(maxsize=64)
def _counts_of(content: tuple[int, ...], shape: tuple[int, ...], spec: SelectionSpec) -> torch.Tensor:
    both = torch.tensor(content, dtype=torch.int64).view(shape)
    visible, reach = both[0], both[-1]
    limit = row_limits(visible, spec, reach)
    return torch.where(full_rows(visible, limit, spec, reach), FULL, limit).int()


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    tensors: Tensors,
    scalars: Sequence[int],
    mask: str,
    scale: float,
    spec: str,
    kernel: str,
    lse: torch.Tensor | None = None,
    score: str = "",
) -> torch.Tensor:
    """Softmax attention over the visible keys of the selected blocks; a row without any gives 0.

    q: [B, H, q_len, d]. k: [B, Hk, kv_len, d], v: [B, Hk, kv_len, dv]. indices, counts: as ``select`` returns. Result:
    ``ops.attention_output``.
    lse: [B, H, q_len], receives the log-sum-exp of each row's visible scores and its sink, -inf without any.
    """
    chosen, meaning, modifier = parse(spec), decode(mask), scores.decode(score)
    out = ops.attention_output(q, v)
    if modifier.sink is not None and lse is None:
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    if _is_general(mask, score):
        problem = _problem(q, k, v, indices, tensors, scalars, Full(), scale, chosen, out)
        problem.lse = lse
        rowwise.attend(problem, counts, tensors, scalars, meaning, modifier)
        return _with_sink(out, lse, modifier, tensors, scalars, k.shape[2])

    def pieces() -> Iterator[tuple[Problem, Run]]:
        # Lazy, so that a worker plans: its small calls run alone instead of waiting for torch's other threads.
        problem = _problem(q, k, v, indices, tensors, scalars, meaning, scale, chosen, out)
        problem.lse = lse
        for run in sorted(_runs(problem, counts, chosen), key=lambda run: run.count is not None):
            yield problem, run

    workers.run(lambda piece: attend_run(*piece), pieces())
    return _with_sink(out, lse, modifier, tensors, scalars, k.shape[2])


def _with_sink(
    out: torch.Tensor,
    lse: torch.Tensor | None,
    score: scores.Score,
    tensors: Tensors,
    scalars: Sequence[int],
    kv_len: int,
) -> torch.Tensor:
    """Both with the sink joined: keys keep the share they have beside it; a row without keys is 0 and stays it."""
    if score.sink is None or lse is None:
        return out
    sink = score.sink_logits((*out.shape[:3], kv_len), tensors, scalars, lse)
    assert sink is not None
    out.mul_(torch.sigmoid(lse.unsqueeze(-1) - sink).to(out.dtype))
    torch.logaddexp(lse, sink.squeeze(-1), out=lse)
    return out


def _problem(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    tensors: Tensors,
    scalars: Sequence[int],
    mask: Mask,
    scale: float,
    spec: SelectionSpec,
    out: torch.Tensor,
) -> Problem:
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    dtype = q.dtype if NATIVE_BF16 and q.dtype == torch.bfloat16 else torch.promote_types(q.dtype, torch.float32)
    width = max(k.shape[3], v.shape[3])
    columns = blocks.cdiv(shape[3], spec.block_k)
    keys, values = (dense(x, dtype, width, columns * spec.block_k) for x in (k, v))
    offset = blocks.causal_offset(mask, shape, tensors, scalars)
    problem = Problem(
        q, keys, values, out, indices, spec.block_q, spec.block_k, shape[3], scale, offset, [0] * shape[0]
    )
    visible = blocks.key_visible(mask, shape, tensors, scalars, q.device)
    if visible is not None and not bool(visible.all()):
        hidden = ~F.pad(visible.expand(shape[0], -1), (0, keys.shape[2] - shape[3]))
        problem.bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
        per_block = hidden.unflatten(1, (columns, spec.block_k)).sum(-1)
        problem.first = (per_block == spec.block_k).int().cumprod(-1).sum(-1).tolist()
        problem.cut = F.pad(per_block.cumsum(-1), (1, 0)).tolist()
    return problem


def _runs(p: Problem, counts: torch.Tensor, spec: SelectionSpec) -> Iterator[Run]:
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
                    yield Run(
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
    found = listed.gather(-1, place.clamp(min=0).long())
    window = ((found == spans[:, 1:] - back) & (place >= 0)).int().cumprod(-1).sum(-1)
    # A window that leaves a diagonal block to the gathered part is none.
    window = window.masked_fill(window < spans[:, 1] - spans[:, 0], 0)
    # Nor does a prefix reach over the diagonal.
    return torch.minimum(prefix, (spans[:, 0] - first[..., 0]).clamp(min=0)), window
