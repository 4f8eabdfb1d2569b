"""Block-sparse attention under any mask and any score on CPUs: one query row block of the heads that share a key head
at a time.

Mask and score are evaluated at the positions of the listed blocks only. What can be written as a bias goes through
PyTorch's flash attention; a score that is more than a bias (softcap) is computed with all scores of a row block in
memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from stem_compile.algebra import symbolic
from stem_compile.algebra.masks import environment
from stem_compile.algebra.scores import Score
from stem_compile.algebra.symbolic import KV, SCORE, B, H, Q
from stem_compile.kernels.targets.cpu import workers
from stem_compile.kernels.targets.cpu.gather import Problem, blind_to, dense, flash
from stem_compile.selection import FULL, Attention


@dataclass(frozen=True)
class Piece:
    """Query row block ``row`` of ``heads``, which share a key head and a list of key blocks."""

    batch: int
    heads: range
    row: int
    listed: torch.Tensor


def attend(p: Problem, counts: torch.Tensor, attention: Attention) -> None:
    """Fill ``p.out`` and ``p.lse``. p: a problem without bias; counts: int32 [B, H, query blocks]. The caller joins the
    sink."""
    heads, q_len = p.q.shape[1:3]
    score, predicate = attention.score, attention.mask.mask.predicate
    exact = torch.promote_types(p.keys.dtype, torch.float32)
    tensors = [t.to(exact) if t.is_floating_point() else t for t in attention.tensors]
    env = environment(attention.shape, tensors, attention.scalars)
    bias = None if not score.modified else symbolic.expand(score.expr - SCORE)
    if bias is not None and bias.has(SCORE):
        bias = None

    def piece(at: Piece) -> None:
        rows = slice(at.row * p.block_q, min((at.row + 1) * p.block_q, q_len))
        out = p.out[at.batch, at.heads.start : at.heads.stop, rows]
        lse = None if p.lse is None else p.lse[at.batch, at.heads.start : at.heads.stop, rows]
        if not len(at.listed):
            out.zero_()
            if lse is not None:
                lse.fill_(-torch.inf)
            return
        q = dense(p.q[at.batch, at.heads.start : at.heads.stop, rows], p.keys.dtype, p.keys.shape[-1])
        head = at.heads.start // (heads // p.keys.shape[1])
        key, value = (
            x[at.batch, head].unflatten(0, (-1, p.block_k)).index_select(0, at.listed).flatten(0, 1)
            for x in (p.keys, p.values)
        )
        position = (at.listed[:, None] * p.block_k + torch.arange(p.block_k)).flatten()
        here = env | {B: torch.tensor(at.batch), H: torch.tensor(list(at.heads))[:, None, None]}
        here |= {Q: torch.arange(rows.start, rows.stop)[:, None], KV: position}
        visible = torch.as_tensor(symbolic.evaluate(predicate, here)) & (position < p.kv_len)
        gone = ~visible.expand(len(at.heads), q.shape[1], len(position)).flatten(0, 1).any(0)
        if bool(gone.any()):
            # A bias does not hide what is NaN.
            key, value = (x.masked_fill_(gone[:, None], 0) for x in (key, value))
        # A bias stays in fp32 beside products in bf16, which have no digits for it.
        added = torch.zeros((), dtype=key.dtype)
        if bias is not None:
            added = torch.as_tensor(symbolic.evaluate(bias, here)).to(exact)
        hidden = torch.where(visible, added, -torch.inf).expand(len(at.heads), q.shape[1], len(position))
        if score.modified and bias is None:
            result, total = _open(q, key, value, p.scale, score, here, hidden)
        else:
            shared = (len(q), 1, -1, -1)
            result, total = flash(
                q[:, None],
                key.expand(shared),
                value.expand(shared),
                p.scale,
                hidden[:, None],
                blind_to(hidden)[:, None],
            )
            result, total = result[:, 0], total[:, 0]
        out.copy_(result[..., : p.out.shape[-1]])
        if lse is not None:
            lse.copy_(total)

    workers.run(piece, _pieces(p, counts, attention))


def _open(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    score: Score,
    env: dict[Any, Any],
    hidden: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output [heads, tokens, width], log-sum-exp [heads, tokens]) with every score in memory: a row block's worth."""
    product = (q @ key.t()).to(torch.promote_types(q.dtype, torch.float32))
    # A score may be anything where it is hidden; where it is visible, NaN stays NaN.
    scores = torch.where(hidden == -torch.inf, -torch.inf, score.apply(product * scale, env) + hidden)
    # Divided by the sum rather than lowered by its logarithm, which is lost in a peak of -1e38.
    peak = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    weights = (scores - peak).exp_()
    sums = weights.sum(-1, keepdim=True)
    result = weights.div_(sums.masked_fill(sums == 0, 1.0)).to(value.dtype) @ value
    return result, (peak + sums.log()).squeeze(-1)


def _pieces(p: Problem, counts: torch.Tensor, attention: Attention) -> Iterator[Piece]:
    batch, heads, rows = counts.shape
    group = attention.group
    lengths = counts.tolist()
    full_rows = bool((counts == FULL).any())
    candidates = attention.candidates.expand(batch, -1, -1, -1) if full_rows else counts

    def listed(b: int, h: int, row: int) -> torch.Tensor:
        count = lengths[b][h][row]
        if count == FULL:
            return candidates[b, h % candidates.shape[1], row].nonzero()[:, 0]
        return p.indices[b, h, row, :count]

    for row in range(rows - 1, -1, -1):
        for b in range(batch):
            for start in range(0, heads, group):
                together = range(start, start + group)
                if all(lengths[b][h][row] == FULL for h in together) and candidates.shape[1] == 1:
                    yield Piece(b, together, row, listed(b, start, row))
                else:
                    yield from (Piece(b, range(h, h + 1), row, listed(b, h, row)) for h in together)
