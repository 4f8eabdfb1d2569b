"""Sparse prefill of a batch as serving engines keep it: packed queries, keys and values packed or in pages, prompts in
chunks. Knows no engine; one sequence after the other goes through the kernels of its device."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from stem_compile.algebra import masks
from stem_compile.algebra.scores import Score
from stem_compile.algebra.symbolic import SCORE, H, tensor
from stem_compile.config import OptionError, StemConfig
from stem_compile.kernels import launch
from stem_compile.selection import Attention, Observed, announce

Lengths = torch.Tensor | Sequence[int]
PAGES = range(16, 257)
"""Tokens a page may hold."""


def sparse_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cu_seqlens_q: Lengths,
    cu_seqlens_k: Lengths,
    block_table: torch.Tensor | None = None,
    prompt_lengths: Lengths | None = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
    softcap: float | None = None,
    options: Mapping[str, Any] | StemConfig | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of packed sequences, each of which selects its blocks by itself.

    q: [tokens, heads, d]. k, v: packed, [keys, key heads, d or dv], or with ``block_table`` in pages of 16 to 256
    tokens, [pages, page, key heads, d or dv]. Any strides: a cache that keeps heads before tokens, [pages, key heads,
    page, d], is given as ``cache.transpose(1, 2)``. cu_seqlens_q, cu_seqlens_k: n + 1 integers from 0 that do not fall;
    queries and keys of sequence i lie between entries i and i + 1, and the queries are the last of the keys. Under
    ``block_table``, integers [n, width], cu_seqlens_k only tells lengths, and row i names the pages of sequence i in
    order; what it holds past them is not read, nor is a page that no sequence names. prompt_lengths: n integers, tokens
    of the whole prompts, where they come in chunks; budgets are reckoned by them. A chunk that cuts a block of queries
    in two computes that block densely; every other block selects as one shot would (but under metric="released", which
    sees later tokens). Sequences whose prompt is shorter than ``options`` select on, and queries behind a prompt, are
    dense. All lengths and the table are on the CPU, so that nothing waits for a device.

    scale: of q.k, None is d ** -0.5. window: tokens that a query sees, its own the last; None is all. sinks: [heads], a
    logit beside each row's. softcap: cap of the scaled products. options: as of ``torch.compile(backend="stem")``,
    those of one layer. out: [tokens, heads, dv] to write into, in memory of its own.

    Result: (out, lse). out: [tokens, heads, dv] in q's dtype. lse: [tokens, heads] in at least fp32, the natural
    logarithm of the sum of each row's exponentials, the sink's among them, for merging with other keys' attention. Rows
    past cu_seqlens_q's end give 0 and -inf.

    Raises ValueError (OptionError for ``options``) before anything is computed.
    """
    config = _config(options)
    starts, ends, tables = _checked(q, k, v, cu_seqlens_q, cu_seqlens_k, block_table)
    keys = _lengths(ends)
    _check_extras(q, k, v, scale, window, sinks, softcap, out)
    prompts = keys if prompt_lengths is None else _prompts(prompt_lengths, keys)
    pieces = _all_pieces(starts, keys, prompts, config)
    texts = _Texts(config, q.shape[-1] ** -0.5 if scale is None else float(scale), window, softcap, sinks)
    if pieces:
        _refuse(q, k, v, texts)
    result = q.new_zeros(q.shape[0], q.shape[1], v.shape[-1]) if out is None else out
    result[starts[-1] :] = 0
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for row, parts in itertools.groupby(pieces, key=lambda piece: piece.row):
        keyed, valued = _sequence(k, v, ends[row], ends[row + 1], None if tables is None else tables[row])
        for part in parts:
            rows = slice(part.start, part.start + part.queries)
            attention = texts.attention(q[rows], keyed[: part.keys], valued[: part.keys], part)
            result[rows], lse[rows] = _computed(attention, part)
    return result, lse


@dataclass(frozen=True)
class _Piece:
    """Queries that are computed one way: the last of the first ``keys`` tokens of sequence ``row``. start: the first
    one's place among the packed ones. prompt: tokens of the whole prompt."""

    row: int
    start: int
    queries: int
    keys: int
    prompt: int
    sparse: bool


def _all_pieces(starts: Sequence[int], keys: Sequence[int], prompts: Sequence[int], config: StemConfig) -> list[_Piece]:
    return [
        piece
        for row, (first, last) in enumerate(itertools.pairwise(starts))
        for piece in _pieces(row, first, last - first, keys[row], prompts[row], config)
    ]


def _pieces(row: int, start: int, queries: int, keys: int, prompt: int, config: StemConfig) -> Iterator[_Piece]:
    begin, total = keys - queries, max(prompt, keys)
    edges = [begin, keys, keys, keys]
    # A prompt that was preempted prefills what it had generated too: only queries behind the prompt alone decode.
    if begin < prompt and total >= max(config.shortest, 2):
        block = config.block_size
        first = min(-(-begin // block) * block, keys)
        edges = [begin, first, max(first, keys if keys >= total else keys // block * block), keys]
    for number, (low, high) in enumerate(itertools.pairwise(edges)):
        if high > low:
            yield _Piece(row, start + low - begin, high - low, high, total, number == 1)


@dataclass(frozen=True)
class _Texts:
    """What all sequences of a call share."""

    config: StemConfig
    scale: float
    window: int | None
    softcap: float | None
    sinks: torch.Tensor | None

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, piece: _Piece) -> Attention:
        """q: [queries, heads, d]; k, v: [keys, key heads, d or dv]."""
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return Attention(
            q,
            k,
            v,
            mask_text=_mask(piece.keys - piece.queries, self.window),
            scale=self.scale,
            spec_text=_spec(self.config, piece.prompt),
            score_text=_score(self.softcap, self.sinks is not None),
            tensors=() if self.sinks is None else (self.sinks.float(),),
        )


def _computed(attention: Attention, piece: _Piece) -> tuple[torch.Tensor, torch.Tensor]:
    """([queries, heads, dv], [queries, heads])."""
    names, target = launch.kernels(attention), launch.target(attention.device.type)
    assert target is not None, "kernels() has named them"
    lists = launch.all_blocks(attention)
    if piece.sparse:
        lists = announce(Observed(attention.selection(*target.select(attention, names.select)), attention))
    lse = attention.q.new_empty(attention.shape[:3], dtype=torch.promote_types(attention.q.dtype, torch.float32))
    attend: Any = target.attend
    out = attend(attention, lists, names.attend, lse)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def _sequence(
    k: torch.Tensor, v: torch.Tensor, start: int, end: int, pages: list[int] | None
) -> tuple[torch.Tensor, ...]:
    """Keys and values of the sequence whose tokens are counted from ``start`` to ``end``: [keys, key heads, width]."""
    if pages is None:
        return k[start:end], v[start:end]
    places = torch.tensor(pages, dtype=torch.int64).to(k.device)
    return tuple(x.index_select(0, places).flatten(0, 1)[: end - start] for x in (k, v))


def _refuse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, texts: _Texts) -> None:
    """Raise ValueError where the device has no kernel for sequences of this kind."""
    queries, keys, values = (x.new_zeros(1, *x.shape[-2:]) for x in (q, k, v))
    reason = launch.refusal(texts.attention(queries, keys, values, _Piece(0, 0, 1, 1, 1, False)))
    if reason is not None:
        raise ValueError(
            f"{q.device.type}, {q.dtype}, head dims {q.shape[-1]} and {v.shape[-1]}: {reason.value}; compute these"
            " sequences by the engine's own attention"
        )


def _config(options: Mapping[str, Any] | StemConfig | None) -> StemConfig:
    config = StemConfig.from_options(options)
    plain = StemConfig()
    for name in ("dense_layers", "fuel", "prompt_length"):
        if getattr(config, name) != getattr(plain, name):
            raise OptionError(
                f"{name}={getattr(config, name)!r}: sparse_prefill computes one layer of many prompts; leave it out"
                " (prompt_lengths= tells each prompt's length)"
            )
    if isinstance(config.budget, tuple):
        raise OptionError(f"budget={config.budget!r}: sparse_prefill computes one layer; give that layer's number")
    return config


def _numbers(name: str, values: Lengths) -> list[int]:
    """Integers of a list or of a tensor on the CPU. Raises ValueError for anything else."""
    if isinstance(values, torch.Tensor):
        if values.device.type != "cpu":
            raise ValueError(f"{name} is on {values.device}: give it on the CPU, since reading it there would wait")
        if values.dim() != 1 or values.dtype.is_floating_point or values.dtype == torch.bool:
            raise ValueError(f"{name} is {values.dtype} {tuple(values.shape)}: integers in one dimension are needed")
        values = values.tolist()
    numbers = list(values)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in numbers):
        raise ValueError(f"{name}={numbers!r}: integers are needed")
    return numbers


def _starts(name: str, values: Lengths, tokens: int | None) -> list[int]:
    """``cu_seqlens``: from 0 on, never falling, at most ``tokens``. Raises ValueError for others."""
    numbers = _numbers(name, values)
    if not numbers or numbers[0] != 0:
        raise ValueError(f"{name} begins with {numbers[:1]}: n + 1 integers from 0 on are needed")
    for i, (low, high) in enumerate(itertools.pairwise(numbers)):
        if high < low:
            raise ValueError(f"{name} falls from {low} to {high} at sequence {i}: no length may be negative")
    if tokens is not None and numbers[-1] > tokens:
        raise ValueError(f"{name} ends at {numbers[-1]}, and there are {tokens} tokens")
    return numbers


def _checked(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: Lengths, cu_k: Lengths, table: torch.Tensor | None
) -> tuple[list[int], list[int], list[list[int]] | None]:
    """(cu_seqlens_q, cu_seqlens_k, each sequence's pages) as lists; pages None without a table. Raises ValueError where
    things do not fit."""
    _check_tensors(q, k, v, paged=table is not None)
    starts = _starts("cu_seqlens_q", cu_q, q.shape[0])
    ends = _starts("cu_seqlens_k", cu_k, k.shape[0] if table is None else None)
    if len(starts) != len(ends):
        raise ValueError(f"cu_seqlens_q tells {len(starts) - 1} sequences and cu_seqlens_k {len(ends) - 1}")
    keys = _lengths(ends)
    for i, (queries, have) in enumerate(zip(_lengths(starts), keys, strict=True)):
        if queries > have:
            raise ValueError(f"sequence {i} has {queries} queries and {have} keys: queries are the last of the keys")
    return starts, ends, None if table is None else _tables(table, keys, k)


def _lengths(starts: Sequence[int]) -> list[int]:
    return [high - low for low, high in itertools.pairwise(starts)]


def _tables(table: torch.Tensor, keys: Sequence[int], k: torch.Tensor) -> list[list[int]]:
    pages, page = k.shape[:2]
    whole = not (table.dtype.is_floating_point or table.dtype == torch.bool)
    if table.device.type != "cpu" or table.dim() != 2 or not whole or len(table) != len(keys):
        raise ValueError(
            f"block_table is {table.dtype} {tuple(table.shape)} on {table.device}: integers [{len(keys)}, width] on the"
            " CPU are needed"
        )
    result = []
    for i, (row, length) in enumerate(zip(table.tolist(), keys, strict=True)):
        used = -(-length // page)
        if used > len(row):
            raise ValueError(
                f"block_table is too narrow: {length} keys of sequence {i} fill {used} pages of {page}, it has"
                f" {len(row)}"
            )
        wrong = next((n for n in row[:used] if not 0 <= n < pages), None)
        if wrong is not None:
            raise ValueError(f"block_table names page {wrong} for sequence {i}: pages are 0 to {pages - 1}")
        result.append(row[:used])
    return result


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, paged: bool) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    wanted = 4 if paged else 3
    if not (q.dim() == 3 and k.dim() == v.dim() == wanted and k.shape[:-1] == v.shape[:-1]):
        form = "[pages, page, key heads, d]" if paged else "[keys, key heads, d]"
        raise ValueError(f"{shapes}: [tokens, heads, d] and twice {form} are needed {'with' if paged else 'without'} a"
                         " block_table")  # fmt: skip
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{shapes}: q and k need the same head dim")
    if not q.shape[1] or not k.shape[-2] or q.shape[1] % k.shape[-2]:
        raise ValueError(
            f"{q.shape[1]} query heads and {k.shape[-2]} key heads: a whole number of query heads a key head"
        )
    if paged and k.shape[1] not in PAGES:
        raise ValueError(f"{shapes}: a page holds {k.shape[1]} tokens, {PAGES[0]} to {PAGES[-1]} are allowed")
    if len({x.dtype for x in (q, k, v)}) > 1 or len({x.device for x in (q, k, v)}) > 1:
        each = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"q, k and v must share dtype and device: {each}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("sparse_prefill has no backward: call it under torch.no_grad() or detach q, k and v")


def _check_extras(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None,
    window: int | None,
    sinks: torch.Tensor | None,
    softcap: float | None,
    out: torch.Tensor | None,
) -> None:
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and not (isinstance(value, int | float) and 0 < value < float("inf")):
            raise ValueError(f"{name}={value!r}: a finite number above 0, or None")
    if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 1):
        raise ValueError(f"window={window!r}: tokens that a query sees, an integer of at least 1, or None")
    if sinks is not None and (tuple(sinks.shape) != (q.shape[1],) or sinks.device != q.device):
        raise ValueError(f"sinks {tuple(sinks.shape)} on {sinks.device}: [{q.shape[1]}] on {q.device} are needed")
    shape = (*q.shape[:2], v.shape[-1])
    if out is not None and (tuple(out.shape) != shape or out.dtype != q.dtype or out.device != q.device):
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} on {out.device}: {q.dtype} {shape} on {q.device} is needed"
        )
    # A block of rows is written before later ones have read their queries, keys and values.
    if out is not None and out.numel():
        storage = out.untyped_storage().data_ptr()
        for label, x in (("q", q), ("k", k), ("v", v)):
            if x.untyped_storage().data_ptr() == storage:
                raise ValueError(f"out shares memory with {label}: give a tensor of its own, or None")


def _prompts(values: Lengths, keys: Sequence[int]) -> list[int]:
    prompts = _numbers("prompt_lengths", values)
    if len(prompts) != len(keys) or any(n < 0 for n in prompts):
        raise ValueError(f"prompt_lengths={prompts!r}: {len(keys)} lengths, none negative, are needed")
    return prompts


@functools.lru_cache(maxsize=1024)
def _mask(offset: int, window: int | None) -> str:
    causal = masks.Causal(offset)
    return masks.encode(causal if window is None else causal & masks.Window(offset - window + 1))


@functools.lru_cache(maxsize=1024)
def _spec(config: StemConfig, prompt: int) -> str:
    return replace(config.selection, prompt_length=prompt).text()


@functools.lru_cache(maxsize=64)
def _score(softcap: float | None, sink: bool) -> str:
    expr = SCORE if softcap is None else softcap * sympy.tanh(SCORE / softcap)
    return Score(expr, tensor(0)(H) if sink else None).text
