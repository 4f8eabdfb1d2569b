"""Pooled mass: block scores that estimate how much of a row's attention each key block holds.

Softmax attention of a group of adjacent queries over groups of adjacent keys, each group read as its mean: with n_j
keys of mean k_j in group j,

    sum over the group of exp(q . k) is about n_j exp(q . k_j)

so the part that group j holds of a query group's attention is the softmax of ``q_mean . k_mean * scale + log n_j`` over
all groups. Adjacent tokens turn together under rotary embeddings in all but the fastest dimensions, which is why their
mean stands for them. A block pair's score is the part that its key groups hold, averaged over its query groups, as a
logarithm, plus OAM's value term (arXiv 2603.06274, Eq. 7), whose first term it estimates.

Which keys count: a mean is over the keys that terms about keys alone (padding) leave. A key group counts for a query
group where that group's last query sees all of them; under causal order the key group must also be whole, its hidden
positions before the query too, so that a prompt in chunks or in a longer cache selects as it does in one piece.
What a row of query blocks is given therefore never depends on a key that the row does not see.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import sympy
import torch
import torch.nn.functional as F

from stem_compile.algebra import symbolic
from stem_compile.algebra.blocks import cdiv
from stem_compile.algebra.symbolic import KV, B, H, Q
from stem_compile.selection import Attention
from stem_compile.selection.oam import hides_pairs, largest_norms, value_term

CELLS = 1 << 24
"""Group pairs whose scores exist at once."""


class Groups(NamedTuple):
    """Means of adjacent tokens. mean: [B, heads, groups, d]; number: [B or 1, groups], tokens that each mean is over;
    last: int64 [B or 1, groups], position of the last of them (of the group, where there is none)."""

    mean: torch.Tensor
    number: torch.Tensor
    last: torch.Tensor


def grouped(x: torch.Tensor, visible: torch.Tensor | None, size: int, block: int, dtype: torch.dtype) -> Groups:
    """Groups of ``size`` tokens of x [B, heads, n, d], as many as whole blocks hold. visible: bool [B or 1, n]."""
    length = x.shape[2]
    padding = cdiv(length, block) * block - length
    present = torch.ones(1, length, dtype=torch.bool, device=x.device) if visible is None else visible
    if visible is not None:
        x = torch.where(present[:, None, :, None], x, 0)  # a hidden token may hold anything
    present = F.pad(present, (0, padding)).unflatten(1, (-1, size))
    count = present.sum(-1)
    total = F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, size)).sum(3, dtype=dtype)
    mean = total / count.clamp(min=1)[:, None, :, None].to(dtype)
    position = torch.arange(present.shape[1] * size, device=x.device).view(1, -1, size)
    last = torch.where(present, position, -1).amax(-1)
    return Groups(mean, count, torch.where(count > 0, last, position[..., -1].clamp(max=length - 1)))


def log_masses(attention: Attention) -> torch.Tensor:
    """Scores [B, H, query blocks, key blocks], fp32 (fp64 for fp64 inputs); -inf where no score is visible.

    What an attention does to its scaled products is read at a group pair's last query and last visible key. A sink
    takes its part of every row.
    """
    q, k, v, spec, visible = attention.q, attention.k, attention.v, attention.spec, attention.mask.visible
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    size_q, size_k = spec.group_sizes
    queries = grouped(q, None, size_q, spec.block_q, dtype)
    keys = grouped(k, visible, size_k, spec.block_k, dtype)
    across, (rows, columns) = spec.block_q // size_q, attention.blocks
    step = max(1, CELLS // (q.shape[0] * q.shape[1] * keys.number.shape[1]) // across)
    masses = []
    for start in range(0, rows, step):
        part = slice(start * across, (start + step) * across)
        some = Groups(queries.mean[:, :, part], queries.number[:, part], queries.last[:, part])
        masses.append(block_masses(held(attention, some, keys), across, columns))
    if hides_pairs(attention):
        values = row_values(attention, slice(0, rows))
    else:
        values = value_term(largest_norms(v, visible, spec, dtype), spec.metric)
        values = values.repeat_interleave(attention.group, 1)[:, :, None]
    return (torch.cat(masses, 2).log() + spec.beta * values).masked_fill_(~attention.candidates, -torch.inf)


def row_values(attention: Attention, rows: slice) -> torch.Tensor:
    """Value terms where single pairs are hidden, [B, H, rows, key blocks]: of each row's own largest norms, over the
    key groups that count for one of its query groups."""
    spec, (size_q, size_k), columns = attention.spec, attention.spec.group_sizes, attention.blocks[1]
    across, groups = spec.block_q // size_q, columns * (spec.block_k // size_k)
    dtype = torch.float64 if attention.q.dtype == torch.float64 else torch.float32
    small = replace(spec, block_k=size_k)
    norms = largest_norms(attention.v, attention.mask.visible, small, dtype)
    norms = F.pad(norms, (0, groups - norms.shape[-1])).repeat_interleave(attention.group, 1)[:, :, None]
    step = max(1, CELLS // (attention.shape[0] * attention.shape[1] * groups * across))
    terms = []
    for start in range(rows.start, rows.stop, step):
        group = torch.arange(start * across, min(start + step, rows.stop) * across, device=attention.device)
        last = ((group + 1) * size_q).clamp(max=attention.shape[2]) - 1
        shown = counting(attention, last[None], slice(0, groups)).unflatten(2, (-1, across)).any(3)
        terms.append(torch.where(shown, norms, 0).unflatten(-1, (columns, -1)).amax(-1))
    return value_term(torch.cat(terms, 2), spec.metric)


def block_masses(parts: torch.Tensor, across: int, columns: int) -> torch.Tensor:
    """Parts [..., query groups, key groups] that key groups hold, added up over key blocks and averaged over the groups
    of each query block that see anything: [..., query blocks, columns], positive. across: groups a query block."""
    parts = parts.unflatten(-1, (columns, -1)).sum(-1).unflatten(-2, (-1, across))
    seeing = (parts.sum(-1) > 0).sum(-1).clamp(min=1)
    return (parts.sum(-2) / seeing.unsqueeze(-1)).clamp(min=torch.finfo(torch.float32).tiny)


def counting(attention: Attention, last: torch.Tensor, groups: slice) -> torch.Tensor:
    """Bool, broadcastable to [B, H, query groups, key groups]: which key groups, of ``groups``, count for query groups
    whose last queries are ``last`` [1, query groups], as far as terms that are not about keys alone decide."""
    mask, size, kv_len = attention.mask, attention.spec.group_sizes[1], attention.shape[3]
    causal, bands, _, others = mask.parts
    position = torch.arange(groups.start * size, groups.stop * size, device=last.device)
    env = positions(attention, last) | {KV: position.view(1, 1, 1, -1)}
    shown = torch.ones(1, 1, 1, len(position), dtype=torch.bool, device=last.device)
    if causal is not None:
        shown = shown & symbolic.as_tensor(symbolic.evaluate(sympy.Le(KV, Q + causal), env), last.device)
        shown = shown & (position < kv_len)
    if bands or others:
        present = torch.ones(1, kv_len, dtype=torch.bool, device=last.device) if mask.visible is None else mask.visible
        present = F.pad(present, (0, max(0, int(groups.stop) * size - kv_len)))[:, None, None, position]
        predicate = sympy.And(*(term.predicate for term in (*bands, *others)))
        shown = shown & (~present | symbolic.as_tensor(symbolic.evaluate(predicate, env), last.device))
    whole: torch.Tensor = shown.unflatten(-1, (-1, size)).all(-1)
    return whole


def positions(attention: Attention, last: torch.Tensor) -> dict[Any, Any]:
    """Bindings of everything but keys for query groups whose last queries are ``last`` [1, query groups]."""
    batch, heads = (torch.arange(n, device=last.device) for n in attention.shape[:2])
    here = {B: batch.view(-1, 1, 1, 1), H: heads.view(1, -1, 1, 1), Q: last[:, None, :, None]}
    return attention.mask.environment | here


def held(attention: Attention, queries: Groups, keys: Groups) -> torch.Tensor:
    """Part of each query group's attention that each key group holds: [B, H, query groups, key groups]."""
    batch, heads, rows, width = queries.mean.shape
    flat = queries.mean.reshape(batch, keys.mean.shape[1], attention.group * rows, width)
    z = (flat @ keys.mean.transpose(-1, -2)).view(batch, heads, rows, -1) * attention.scale
    env = positions(attention, queries.last)
    z = attention.score.apply(z, env | {KV: keys.last[:, None, None, :]})
    counts = counting(attention, queries.last, slice(0, keys.number.shape[1]))
    hidden = ~(counts & (keys.number > 0)[:, None, None] & (queries.number > 0)[:, None, :, None])
    z = (z + keys.number.clamp(min=1).to(z.dtype).log()[:, None, None]).masked_fill(hidden, -torch.inf)
    total = z.logsumexp(-1, keepdim=True)
    if attention.score.sink is not None:
        sink = symbolic.as_tensor(symbolic.evaluate(attention.score.sink, env), z.device)
        total = torch.logaddexp(total, sink.to(z.dtype).expand(total.shape))
    return (z - total).exp().masked_fill(hidden, 0)
