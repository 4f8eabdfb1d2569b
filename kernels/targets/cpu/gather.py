"""Block-sparse attention out of dense attention calls, for devices without a block-sparse kernel of their own.

A run of query row blocks with lists of one length is split into parts: the leading key blocks that all its rows share,
the trailing ones that slide with the diagonal (both are views, and the heads of a group share them), and the rest,
gathered per row and head. Each part is one call of PyTorch's flash attention for CPUs; the parts are merged by their
log-sum-exp. Only what a mask really cuts gets a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

Part = tuple[torch.Tensor, torch.Tensor]
"""(output [rows, heads of the group, tokens, width], log-sum-exp [rows, heads of the group, tokens], -inf where no key
was visible)."""

GATHERED = 2 << 20
"""Bytes of keys and values copied at once: what a call reads next should still be in a core's cache."""

_flash: Callable[..., Part] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True)
class Span:
    """Consecutive query row blocks of query heads that share a key head. ``count``: length of their lists, None for all
    visible keys.

    prefix: leading blocks of the lists that are ``first``, ``first + 1``, ...; window: trailing blocks that end with
    each row's last visible block.
    """

    batch: int
    heads: range
    rows: range
    count: int | None
    prefix: int = 0
    window: int = 0


@dataclass
class Problem:
    """One attention; its keys and values in the dtype that is computed in: [B, Hk, key blocks * block_k, width], zeros
    past ``kv_len``.

    lse: [B, H, q_len] for the log-sum-exp of each query's scores. offset: keys before the first query, None when not
    causal. first: first block with a visible key, a batch row. bias: 0 or -inf a key, [B, key blocks * block_k], None
    when all are visible. cut: per batch row, hidden keys before each block; only with a bias. diagonals: biases of the
    causal term by their geometry.
    """

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    out: torch.Tensor
    indices: torch.Tensor
    block_q: int
    block_k: int
    kv_len: int
    scale: float
    offset: int | None
    first: list[int]
    lse: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    cut: list[list[int]] = field(default_factory=list)
    diagonals: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)

    def limits(self, row: int) -> tuple[int, int]:
        """Number of keys that the first and the last query of a row block see, padding aside."""
        if self.offset is None:
            return self.kv_len, self.kv_len
        start = row * self.block_q + self.offset + 1
        stop = min((row + 1) * self.block_q, self.q.shape[2]) + self.offset
        return min(max(start, 0), self.kv_len), min(max(stop, 0), self.kv_len)

    def columns(self, row: int) -> tuple[int, int]:
        """Number of key blocks that all queries of a row block see whole, and that any of them sees, padding aside."""
        low, high = self.limits(row)
        return low // self.block_k, -(-high // self.block_k)


def dense(x: torch.Tensor, dtype: torch.dtype, width: int, length: int | None = None) -> torch.Tensor:
    """``x`` [..., tokens, width] contiguous in ``dtype``, zeros up to the new width and length. ``x`` itself where it
    is that already."""
    shape = (*x.shape[:-2], x.shape[-2] if length is None else length, width)
    if x.dtype == dtype and x.shape == shape and x.is_contiguous():
        return x
    padded = x.new_empty(shape, dtype=dtype)
    padded[..., : x.shape[-2], : x.shape[-1]] = x
    padded[..., x.shape[-2] :, :] = 0
    padded[..., x.shape[-1] :] = 0
    return padded


def attend(p: Problem, span: Span) -> None:
    """Write the run's rows of ``p.out``."""
    tokens = slice(span.rows.start * p.block_q, min(span.rows.stop * p.block_q, p.q.shape[2]))
    heads = slice(span.heads.start, span.heads.stop)

    def rows_of(x: torch.Tensor) -> torch.Tensor:
        # [rows, heads, tokens, ...]: heads beside tokens, so that calls on shared keys see one tall query. Full rows
        # are one.
        rows = 1 if span.count is None else len(span.rows)
        part: torch.Tensor = x[span.batch, heads, tokens]
        return part.view(len(part), rows, -1, *part.shape[2:]).transpose(0, 1)

    q = dense(rows_of(p.q), p.keys.dtype, p.keys.shape[-1])
    out, lse = rows_of(p.out), None if p.lse is None else rows_of(p.lse)
    done: Part | None = None
    for part in _full(p, span, q) if span.count is None else _shared_lists(p, span, q):
        done = part if done is None else (_mix(done, part), torch.logaddexp(done[1], part[1]))
    if span.count is None or span.prefix + span.window == span.count:
        _write(out, lse, done)
        return
    for some, part in _gathered(p, span, q):
        _write(
            out[some],
            None if lse is None else lse[some],
            part,
            None if done is None else (done[0][some], done[1][some]),
        )


def _mix(a: Part, b: Part, out: torch.Tensor | None = None) -> torch.Tensor:
    """Attention over the union of two parts' keys; 0 where neither has a visible one."""
    # Neither: the difference is NaN, and both outputs are 0. NaN of the inputs stays.
    weight = torch.where(b[1] == -torch.inf, 0.0, torch.sigmoid(b[1] - a[1])).unsqueeze(-1)
    return torch.lerp(a[0].to(weight.dtype), b[0].to(weight.dtype), weight, out=out)


def _write(out: torch.Tensor, lse: torch.Tensor | None, a: Part | None, b: Part | None = None) -> None:
    if a is None:
        out.zero_()
    elif b is not None and out.dtype == a[1].dtype and out.shape == a[0].shape:
        _mix(a, b, out)
    else:
        out.copy_((a[0] if b is None else _mix(a, b))[..., : out.shape[-1]])
    if lse is not None:
        lse.copy_(torch.full((), -torch.inf) if a is None else a[1] if b is None else torch.logaddexp(a[1], b[1]))


def _full(p: Problem, span: Span, q: torch.Tensor) -> Iterator[Part]:
    """All visible keys: those before the run's diagonal in one piece, then the triangle."""
    start = p.first[span.batch] * p.block_k
    middle = max(start, p.columns(span.rows[0])[0] * p.block_k)
    end = p.limits(span.rows[-1])[1]
    if start < middle:
        yield _shared(p, span, q, start, middle)
    if middle < end:
        yield _triangle(p, span, q, middle, end)


def _triangle(p: Problem, span: Span, q: torch.Tensor, start: int, end: int) -> Part:
    """Full rows against the keys [start, end) around their diagonal: without a bias where key ``start`` is the first
    query's own."""
    tokens, first = q.shape[2], span.rows.start * p.block_q
    # The call masks before it scales, which only a positive scale survives.
    if (
        p.scale <= 0
        or p.offset is None
        or start != first + p.offset
        or end != start + tokens
        or _cut(p, span, start, end)
    ):
        return _shared(p, span, q, start, end, diagonal=True)
    keys, values = (
        x[span.batch, _key_head(p, span), None, None, start:end].expand(1, q.shape[1], -1, -1)
        for x in (p.keys, p.values)
    )
    return _flash(q, keys, values, 0.0, True, scale=p.scale)


def _shared_lists(p: Problem, span: Span, q: torch.Tensor) -> Iterator[Part]:
    """What the lists hold that needs no gathering."""
    if span.prefix:
        start = p.first[span.batch] * p.block_k
        yield _shared(p, span, q, start, start + span.prefix * p.block_k)
    if span.window:
        yield _window(p, span, q)


def _shared(p: Problem, span: Span, q: torch.Tensor, start: int, end: int, diagonal: bool = False) -> Part:
    """All rows and heads of the run against the same keys [start, end)."""
    keys, values = (x[span.batch, _key_head(p, span), None, None, start:end] for x in (p.keys, p.values))
    bias, blind = _diagonal(p, span.rows.start * p.block_q, q.shape[:3], start, end) if diagonal else (None, None)
    if _cut(p, span, start, end):
        assert p.bias is not None
        hidden = p.bias[span.batch, None, None, None, start:end]
        bias = hidden if bias is None else bias + hidden
        blind = blind_to(bias)
    return _part(p, q, (1, 1, -1), keys, values, bias, blind)


def _window(p: Problem, span: Span, q: torch.Tensor) -> Part:
    """Each row block against its last key blocks: overlapping views of the keys, one diagonal for all rows."""
    rows, group, height, _ = q.shape
    size = span.window * p.block_k
    start = p.columns(span.rows[0])[1] * p.block_k - size
    keys, values = (
        _sliding(x[span.batch, _key_head(p, span)], start, rows, size, p.block_q)[:, None] for x in (p.keys, p.values)
    )
    bias, blind = _diagonal(p, span.rows.start * p.block_q, torch.Size((1, group, height)), start, start + size)
    if p.bias is not None:
        bias = bias + _sliding(p.bias[span.batch, :, None], start, rows, size, p.block_q).transpose(1, 2)[:, None]
        blind = blind_to(bias)
    return _part(p, q, (rows, 1, -1), keys, values, bias, blind)


def _gathered(p: Problem, span: Span, q: torch.Tensor) -> Iterator[tuple[slice, Part]]:
    """What the lists hold between prefix and window, for some of the run's rows at a time. Without a window this may
    reach over the diagonal."""
    rows, group, height, width = q.shape
    assert span.count is not None
    listed = p.indices[
        span.batch,
        span.heads.start : span.heads.stop,
        span.rows.start : span.rows.stop,
        span.prefix : span.count - span.window,
    ].transpose(0, 1)
    bias = None
    if p.bias is not None:
        bias = p.bias[span.batch].view(-1, p.block_k).index_select(0, listed.reshape(-1)).view(rows, group, 1, -1)
    if not span.window and int(listed.max()) >= p.columns(span.rows[0])[0]:
        late = _late(
            p,
            span.rows.start * p.block_q,
            rows * height,
            (listed.unsqueeze(-1) * p.block_k + torch.arange(p.block_k)).view(rows, group, 1, -1),
        )
        bias = late if bias is None else bias + late
    keys, values = (x[span.batch, _key_head(p, span)].view(-1, p.block_k * width) for x in (p.keys, p.values))
    step = max(1, GATHERED // (2 * group * listed.shape[-1] * p.block_k * width * q.element_size()))
    for start in range(0, rows, step):
        some = slice(start, min(start + step, rows))
        index = listed[some].reshape(-1)
        shape = ((some.stop - some.start) * group, 1, -1, width)
        cut = None if bias is None else bias[some].flatten(0, 1)[:, None]
        blind = None if cut is None else blind_to(cut)
        yield (
            some,
            _part(
                p,
                q[some],
                shape[:3],
                keys.index_select(0, index).view(shape),
                values.index_select(0, index).view(shape),
                cut,
                blind,
            ),
        )


def _part(
    p: Problem,
    q: torch.Tensor,
    shape: tuple[int, ...],
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    blind: torch.Tensor | None,
) -> Part:
    """q: [rows, heads, tokens, width], seen as ``shape`` by the call. bias: 0 or -inf, broadcastable to the scores.
    blind: queries that see nothing."""
    out, lse = flash(q.view(*shape, q.shape[-1]), keys, values, p.scale, bias, blind)
    return out.reshape(q.shape), lse.reshape(q.shape[:-1])


def flash(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None,
    blind: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, log-sum-exp) of [B, 1, tokens, width] against [B, 1, keys, width]; arguments as above."""
    if bias is not None:
        bias = bias.expand(-1, 1, q.shape[2], -1)
    out, lse = _flash(q, keys, values, 0.0, False, attn_mask=bias, scale=scale)
    # The call reports a log-sum-exp of 0 for a query that sees nothing.
    return out, lse if blind is None else lse.masked_fill(blind, -torch.inf)


def _diagonal(
    p: Problem, query: int, shape: torch.Size, start: int, end: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(0 or -inf [1, 1, rows * heads * tokens, end - start], blind queries) for ``shape`` = (rows, heads, tokens) from
    ``query`` on."""
    key = (*shape, start - query, end - start, min(p.kv_len, end) - start)
    if key not in p.diagonals:
        rows, group, height = shape
        late = _late(p, query, rows * height, torch.arange(start, end).expand(rows, 1, 1, -1))
        bias = late.expand(-1, group, -1, -1).reshape(1, 1, rows * group * height, -1)
        blind = blind_to(bias)
        p.diagonals[key] = bias, blind if bool(blind.any()) else None
    return p.diagonals[key]


def _late(p: Problem, query: int, tokens: int, position: torch.Tensor) -> torch.Tensor:
    """-inf where a key's ``position`` [rows, heads, 1, keys] is past the sequence or after the query, 0 elsewhere:
    [rows, heads, tokens, keys]."""
    limit = torch.full((tokens,), p.kv_len)
    if p.offset is not None:
        limit = (torch.arange(query, query + tokens) + p.offset + 1).clamp(max=p.kv_len)
    late = position >= limit.view(position.shape[0], 1, -1, 1)
    return torch.zeros(late.shape, dtype=p.keys.dtype).masked_fill_(late, -torch.inf)


def blind_to(bias: torch.Tensor) -> torch.Tensor:
    """Queries that a bias leaves no key."""
    return (bias == -torch.inf).all(-1)


def _cut(p: Problem, span: Span, start: int, end: int) -> bool:
    """Whether a key of the blocks of [start, end) is hidden."""
    return p.bias is not None and p.cut[span.batch][-(-end // p.block_k)] > p.cut[span.batch][start // p.block_k]


def _key_head(p: Problem, span: Span) -> int:
    return span.heads.start // (p.q.shape[1] // p.keys.shape[1])


def _sliding(x: torch.Tensor, start: int, rows: int, size: int, step: int) -> torch.Tensor:
    """[rows, size, width] of x [tokens, width]: windows that begin ``step`` tokens apart."""
    return x.as_strided(
        (rows, size, x.shape[1]),
        (step * x.stride(0), x.stride(0), x.stride(1)),
        x.storage_offset() + start * x.stride(0),
    )
