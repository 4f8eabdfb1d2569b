"""Selection by pooled mass on CPUs: what ``mass.log_masses`` and ``tpd.tpd_select`` define, in pieces that stay in a
core's cache.

A piece is a few query blocks of the heads of one key head against all key groups that they may see: one matrix
product, one softmax, one sum over key blocks. Block scores of all heads exist for some rows at a time, so that heads
can divide budgets among themselves.
"""

from __future__ import annotations

from typing import Any

import torch

from stem_compile import ops
from stem_compile.algebra import symbolic
from stem_compile.algebra.symbolic import KV, B, H
from stem_compile.kernels.targets.cpu import workers
from stem_compile.selection import Attention, packed
from stem_compile.selection.mass import block_masses, counting, grouped, positions, row_values
from stem_compile.selection.oam import hides_pairs, largest_norms, value_term
from stem_compile.selection.tpd import best_blocks, divided_counts

CELLS = 1 << 19
"""Group pairs of a piece: what one product leaves should still be in a core's cache when its softmax reads it."""
SCORES = 1 << 24
"""Block scores of all heads that exist at once."""


def ranked(attention: Attention, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(indices, counts) of ``BlockSelection``. counts: int32 [B or 1, H or 1, query blocks], before heads divide
    them."""
    q, k, spec = attention.q, attention.k, attention.spec
    (rows, columns), heads = attention.blocks, q.shape[1]
    width, shape = int(ops.list_capacity(k, spec)), ops.counts_shape(q, spec)
    masses = _Masses(attention)
    candidates = attention.candidates
    counts = counts.expand(shape).contiguous()
    indices = q.new_zeros(ops.selection_shape(q, k, spec), dtype=torch.int32)
    together = spec.sharing_heads(heads, k.shape[1])
    step = max(1, SCORES // (q.shape[0] * heads * columns))
    for start in range(0, rows, step):
        some = slice(start, min(start + step, rows))
        if not bool((counts[:, :, some] > 0).any()):
            continue
        scores = masses.scores(some, counts)
        possible = candidates[:, :, some].expand(*scores.shape)
        scores.masked_fill_(~possible, -torch.inf)
        if spec.divides:
            counts[:, :, some] = divided_counts(scores, possible, counts[:, :, some], spec, together)
        # No row lists more: a shorter sort serves.
        longest = columns if spec.share != "none" else width
        lists = best_blocks(scores, possible, counts[:, :, some], longest, spec)
        if spec.share == "none":
            indices[:, :, some] = lists
        else:
            indices[:, some] = packed(lists, counts[:, :, some], width)
    return indices, counts


class _Masses:
    """Means of one attention's groups, and the block scores that they give."""

    def __init__(self, attention: Attention) -> None:
        self.attention = attention
        q, k, v, spec, visible = attention.q, attention.k, attention.v, attention.spec, attention.mask.visible
        self.dtype = dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        size_q, size_k = spec.group_sizes
        self.across, self.along = spec.block_q // size_q, spec.block_k // size_k
        self.queries = grouped(q, None, size_q, spec.block_q, dtype)
        self.keys = grouped(k, visible, size_k, spec.block_k, dtype)
        # log of the keys a group, -inf for none; equal numbers cancel in a softmax, unless a sink joins it.
        alike = bool((self.keys.number == size_k).all()) and attention.score.sink is None
        self.weights = None if alike else self.keys.number.to(dtype).log()[:, None, None]
        self.values: torch.Tensor | None = None
        if not hides_pairs(attention):
            self.values = value_term(largest_norms(v, visible, spec, dtype), spec.metric) * spec.beta

    def scores(self, rows: slice, counts: torch.Tensor) -> torch.Tensor:
        """[B, H, rows, key blocks]; garbage where ``counts`` (of all rows) says that no score is needed."""
        attention = self.attention
        batch, heads, columns = attention.shape[0], attention.shape[1], attention.blocks[1]
        scores = self.queries.mean.new_zeros(batch, heads, rows.stop - rows.start, columns)
        step = max(1, CELLS // (attention.group * self.across * columns * self.along))

        def score(piece: tuple[int, int, slice]) -> None:
            b, h, some = piece
            mine = slice(h * attention.group, (h + 1) * attention.group)
            if int(counts[b, mine, some].max()) > 0:
                into = slice(some.start - rows.start, some.stop - rows.start)
                self._score(b, h, some, scores[b, mine, into])

        pieces = [
            (b, h, slice(start, min(start + step, rows.stop)))
            for start in range(rows.start, rows.stop, step)
            for b in range(batch)
            for h in range(attention.k.shape[1])
        ]
        workers.run(score, reversed(pieces))
        if self.values is None:
            scores += row_values(attention, rows) * attention.spec.beta
        return scores

    def _score(self, b: int, h: int, rows: slice, out: torch.Tensor) -> None:
        """out: [heads of key head h, rows, key blocks] of batch row b."""
        attention, across = self.attention, self.across
        part = slice(rows.start * across, rows.stop * across)
        mine = slice(h * attention.group, (h + 1) * attention.group)
        candidates = attention.candidates
        possible = candidates[b % len(candidates), :, rows].flatten(0, 1).any(0)
        reach = int((possible * torch.arange(1, len(possible) + 1)).max())
        if not reach:
            return
        groups = reach * self.along
        queries = self.queries.mean[b, mine, part]
        z = (queries.flatten(0, 1) @ self.keys.mean[b, h, :groups].t()).view(*queries.shape[:2], groups)
        z.mul_(attention.scale)
        last = self.queries.last[:, part]
        if attention.score.modified:
            z = attention.score.apply(z[None], self._positions(b, mine, last, groups))[0].contiguous()
        if self.weights is not None:
            z += self.weights[b % len(self.weights), ..., :groups]
        self._hide(z, b, mine, part)
        peak = z.amax(-1, keepdim=True).clamp_(min=torch.finfo(self.dtype).min)
        z.sub_(peak).exp_()
        held = z.view(*z.shape[:2], reach, self.along).sum(-1)
        total = held.sum(-1, keepdim=True)
        if attention.score.sink is not None:
            env = self._positions(b, mine, last, groups)
            del env[KV]
            sink = symbolic.as_tensor(symbolic.evaluate(attention.score.sink, env), z.device).to(self.dtype)
            total = total + (sink.expand(1, *total.shape)[0] - peak).exp() * (total > 0)
        held.mul_(torch.where(total > 0, 1.0 / total, 0.0))
        mass = block_masses(held, across, reach).log_()
        out[..., :reach] = mass if self.values is None else mass.add_(self.values[b, h, :reach])

    def _positions(self, b: int, mine: slice, last: torch.Tensor, groups: int) -> dict[Any, Any]:
        env = positions(self.attention, last)
        keys = self.keys.last[b % len(self.keys.last), :groups]
        return env | {B: torch.tensor(b), H: env[H][:, mine], KV: keys.view(1, 1, 1, -1)}

    def _hide(self, z: torch.Tensor, b: int, mine: slice, part: slice) -> None:
        """Put -inf into z [heads, query groups, key groups] where a key group does not count."""
        attention, parts = self.attention, self.attention.mask.parts
        groups, last, size = z.shape[-1], self.queries.last[:, part], attention.spec.group_sizes[1]
        # Before ``edge`` every query group sees every key group.
        edge = 0 if parts.bands or parts.others else groups
        if edge and parts.causal is not None:
            limit = min(int(last[0, 0]) + (attention.mask.causal_offset or 0) + 1, attention.shape[3])
            edge = min(groups, max(0, limit) // size)
        if edge < groups:
            counts = counting(attention, last, slice(edge, groups))
            counts = counts[b % len(counts), mine if counts.shape[1] > 1 else slice(None)]
            z[..., edge:].masked_fill_(~counts, -torch.inf)
        absent = self.queries.number[0, part] == 0
        if bool(absent.any()):
            z.masked_fill_(absent[None, :, None], -torch.inf)
