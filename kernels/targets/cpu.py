"""CPU target: block-sparse attention out of PyTorch's own calls; memory grows linearly with the length."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from stem_compile import blocks, ops, policies
from stem_compile.kernels import pooling, workers
from stem_compile.kernels.gather import Problem, Run, dense, flash
from stem_compile.kernels.gather import attend as attend_run
from stem_compile.masks import Full, Mask, decode
from stem_compile.selection import FULL, SelectionSpec, parse
from stem_compile.tpd import full_rows, row_limits

Tensors = Sequence[torch.Tensor]

TALL = 1536
"""Queries of a run, all heads together. PyTorch's flash attention takes its largest tile from 768 on."""
NATIVE_BF16 = torch.backends.cpu.get_cpu_capability().startswith("AVX512") and torch.cpu._is_avx512_bf16_supported()
"""Whether bf16 products are faster than fp32 ones here. Elsewhere everything is computed in fp32, which is exacter too."""

_SHORT = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


def kernel_name(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: str, spec: str) -> str:
    """Name of what ``attend`` runs for (fake) tensors; ``ops.REFERENCE`` for dtypes it has nothing for."""
    if q.dtype not in _SHORT:
        return ops.REFERENCE
    chosen, (_, _, others) = parse(spec), blocks.split(decode(mask))
    return f"cpu {'masked' if others else 'gather'} {_SHORT[q.dtype]} {chosen.block_q}x{chosen.block_k}"


def select_name(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: str, spec: str) -> str:
    """Name of what ``select`` runs."""
    chosen = parse(spec)
    return f"cpu {chosen.pooling if policies.get(chosen.policy).SCORED else 'unscored'} {chosen.block_q}x{chosen.block_k}"


def select(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tensors: Tensors, scalars: Sequence[int], mask: str, scale: float, spec: str, kernel: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks to compute: indices int32 [B, H, query blocks, width] ascending, counts int32 [B, H, query blocks]."""
    chosen, meaning = parse(spec), decode(mask)
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    found = blocks.candidates(meaning, shape, tensors, scalars, chosen.block_q, chosen.block_k, q.device)
    counts = _counts(found.sum(-1), chosen)
    width = int(ops.selection_shape(q, k, chosen)[3])
    if int(counts.max()) <= 0:
        indices = q.new_zeros(*shape[:2], found.shape[2], width, dtype=torch.int32)
    else:
        seen = blocks.key_visible(meaning, shape, tensors, scalars, q.device)
        indices = pooling.ranked(q, k, v, seen, found, counts, width, chosen, scale)
    return indices, counts.expand(shape[0], shape[1], -1).contiguous()


def _counts(visible: torch.Tensor, spec: SelectionSpec) -> torch.Tensor:
    """Lengths of the lists, int32, for rows with ``visible`` candidates. The layers of a model share them."""
    return _counts_of(visible.numpy().tobytes(), tuple(visible.shape), spec)


@functools.lru_cache(maxsize=64)
def _counts_of(visible: bytes, shape: tuple[int, ...], spec: SelectionSpec) -> torch.Tensor:
    rows = torch.frombuffer(bytearray(visible), dtype=torch.int64).view(shape)
    limit = row_limits(rows, spec)
    return torch.where(full_rows(rows, limit, spec), FULL, limit).int()


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, counts: torch.Tensor,
    tensors: Tensors, scalars: Sequence[int], mask: str, scale: float, spec: str, kernel: str,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Softmax attention over the visible keys of the selected blocks; a row without any gives 0.

    q: [B, H, q_len, d]. k: [B, Hk, kv_len, d], v: [B, Hk, kv_len, dv]. indices, counts: as ``select`` returns. Result: ``ops.attention_output``.
    lse: [B, H, q_len], receives the log-sum-exp of each row's visible scores, -inf without any.
    """
    chosen, meaning = parse(spec), decode(mask)
    out = ops.attention_output(q, v)
    if blocks.split(meaning)[2]:
        _masked(q, k, v, indices, counts, tensors, scalars, meaning, scale, chosen, out, lse)
        return out

    def pieces() -> Iterator[tuple[Problem, Run]]:
        # Lazy, so that a worker plans: its small calls run alone instead of waiting for torch's other threads.
        problem = _problem(q, k, v, indices, tensors, scalars, meaning, scale, chosen, out)
        problem.lse = lse
        for run in sorted(_runs(problem, counts, chosen), key=lambda run: run.count is not None):
            yield problem, run

    workers.run(lambda piece: attend_run(*piece), pieces())
    return out


def _problem(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, tensors: Tensors, scalars: Sequence[int],
    mask: Mask, scale: float, spec: SelectionSpec, out: torch.Tensor,
) -> Problem:  # fmt: skip
    shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    dtype = q.dtype if NATIVE_BF16 and q.dtype == torch.bfloat16 else torch.promote_types(q.dtype, torch.float32)
    width = max(k.shape[3], v.shape[3])
    columns = blocks.cdiv(shape[3], spec.block_k)
    keys, values = (dense(x, dtype, width, columns * spec.block_k) for x in (k, v))
    offset = blocks.causal_offset(mask, shape, scalars)
    problem = Problem(q, keys, values, out, indices, spec.block_q, spec.block_k, shape[3], scale, offset, [0] * shape[0])
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
            for some in [range(start, start + group)] if together else [range(h, h + 1) for h in range(start, start + group)]:
                chunk = -(-TALL // (len(some) * p.block_q))
                shapes = [(lengths[b][some[0]][i], min(prefixes[b][h][i] for h in some), min(windows[b][h][i] for h in some), steps[i]) for i in range(rows)]
                row = 0
                while row < rows:
                    stop = row + 1
                    while stop < min(rows, row + chunk) and shapes[stop] == shapes[row]:
                        stop += 1
                    count, prefix, window, _ = shapes[row]
                    yield Run(b, some, range(row, stop), None if count == FULL else count, min(prefix, max(count - window, 0)), window)
                    row = stop


def _step(p: Problem, row: int) -> tuple[int, ...]:
    """Equal for rows whose diagonals look the same, one row block and ``block_q`` keys further on."""
    height = min(p.block_q, p.q.shape[2] - row * p.block_q)
    if p.offset is None:
        return (height,)
    return height, *(limit - row * p.block_q for limit in p.limits(row)), row * p.block_q % p.block_k


def _edges(p: Problem, counts: torch.Tensor, spec: SelectionSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """(leading, trailing) listed blocks that need no gathering: [B, H, rows]. At most the forced ones, so that neighbouring rows agree."""
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


def _masked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, counts: torch.Tensor, tensors: Tensors, scalars: Sequence[int],
    mask: Mask, scale: float, spec: SelectionSpec, out: torch.Tensor, lse: torch.Tensor | None,
) -> None:  # fmt: skip
    """Any mask: evaluated for one query row block at a time and gathered like the keys."""
    batch, heads, q_len, _ = q.shape
    group, kv_len = heads // k.shape[1], k.shape[2]
    shape = (batch, heads, q_len, kv_len)
    problem = _problem(q, k, v, indices, tensors, scalars, Full(), scale, spec, out)
    keys, values = (x.unflatten(2, (-1, spec.block_k)) for x in (problem.keys, problem.values))
    columns, width = keys.shape[2], keys.shape[-1]
    found = blocks.candidates(mask, shape, tensors, scalars, spec.block_q, spec.block_k, q.device).expand(batch, heads, -1, columns)
    lengths = counts.tolist()

    def attend_row(row: int) -> None:
        rows = slice(row * spec.block_q, min((row + 1) * spec.block_q, q_len))
        visible = mask.dense(shape, tensors, scalars, q.device, rows)
        hidden = ~F.pad(visible.expand(-1, -1, rows.stop - rows.start, kv_len), (0, columns * spec.block_k - kv_len)).unflatten(-1, (columns, spec.block_k))
        for b, h in itertools.product(range(batch), range(heads)):
            count = lengths[b][h][row]
            listed = found[b, h, row].nonzero()[:, 0] if count == FULL else indices[b, h, row, :count]
            result, total = q.new_zeros(()), q.new_full((), -torch.inf)
            if len(listed):
                key, value = (x[b, h // group].index_select(0, listed).view(1, 1, -1, width) for x in (keys, values))
                unseen = hidden[b % len(hidden), h % hidden.shape[1]].index_select(1, listed).flatten(1)
                bias = torch.zeros(unseen.shape, dtype=keys.dtype).masked_fill_(unseen, -torch.inf)
                result, total = flash(dense(q[None, None, b, h, rows], keys.dtype, width), key, value, scale, bias[None, None], unseen.all(-1))
                result = result[0, 0, :, : v.shape[3]]
            out[b, h, rows] = result
            if lse is not None:
                lse[b, h, rows] = total

    workers.run(attend_row, range(counts.shape[2] - 1, -1, -1))
