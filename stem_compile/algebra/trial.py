"""Try a mask and a score at compile time as they will be used at run time: from their text, on small stand-ins.

Evaluated, bounded over blocks, asked for rows that see no key and printed, at two lengths (at three where the
expressions hold lengths or scalars), so that nothing can first fail when the compiled function runs. Answers are kept
by text: a model's equal layers are tried once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import sympy
import torch

from stem_compile.algebra import blind, blocks, masks, scores, symbolic
from stem_compile.algebra.masks import Mask, environment
from stem_compile.algebra.scores import Score
from stem_compile.algebra.symbolic import KV, KV_LEN, Q_LEN, B, H, Q

StandIn = tuple[torch.dtype, tuple[int | None, ...]]
"""Of a mask tensor: its dtype and its sizes; None for one that is a symbol or does not matter."""
Printer = Callable[[Mask, Score], str]

LENGTHS = ((21, 21), (13, 34))
"""(q_len, kv_len) that every expression is tried at."""
THIRD = (32, 32)
"""One more for expressions that hold lengths or scalars."""
BLOCK = 8
"""Queries and keys a block where bounds are tried."""
PLACES = 48
"""Entries of a stand-in's dimension at most: reads beyond are clamped, as in kernels."""


def failure(
    mask: str, score: str, tensors: Sequence[StandIn] = (), scalars: int = 0, printers: tuple[Printer, ...] = ()
) -> str | None:
    """What goes wrong with a mask and a score, in words; None where nothing does.

    mask, score: ``masks.encode`` and ``Score.text``. tensors: of T0, T1, ... scalars: number of S0, S1, ... printers:
    functions that print a mask and a score for a device and raise where they cannot. A few milliseconds the first
    time; plain torch on the CPU, whose modes (fake tensors) are the caller's to switch off.
    """
    return _failure(mask, score, tuple((dtype, tuple(sizes)) for dtype, sizes in tensors), scalars, printers)


@functools.lru_cache(maxsize=1024)
def _failure(
    mask: str, score: str, tensors: tuple[StandIn, ...], scalars: int, printers: tuple[Printer, ...]
) -> str | None:
    try:
        meaning, modifier = masks.decode(mask), scores.decode(score)
        for printer in printers:
            printer(meaning, modifier)
        exprs = [e for e in (meaning.predicate, modifier.expr, modifier.sink) if e is not None]
        symbols = set().union(*(sympy.sympify(e).free_symbols for e in exprs))
        third = symbols & {Q_LEN, KV_LEN} or any(s.name.startswith("S") for s in symbols)
        for lengths in (*LENGTHS, THIRD) if third else LENGTHS:
            values = [_stand_in(t, n, lengths) for n, t in enumerate(tensors)]
            _try_mask(meaning, (2, 2, *lengths), values, [7 + n for n in range(scalars)])
            _try_score(modifier, meaning, (2, 2, *lengths), values, [7 + n for n in range(scalars)])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _stand_in(tensor: StandIn, number: int, lengths: tuple[int, int]) -> torch.Tensor:
    """A small tensor of the kind: flags, small whole numbers or numbers about 1."""
    dtype, sizes = tensor
    shape = [1 if size == 1 else max(lengths) if size is None else min(size, PLACES) for size in sizes]
    generator = torch.Generator().manual_seed(number)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.7
    if dtype.is_floating_point:
        return (torch.rand(shape, generator=generator) + 0.5).to(dtype)
    return torch.randint(0, 8, shape, generator=generator).to(dtype)


def _try_mask(mask: Mask, shape: blocks.Shape, tensors: list[torch.Tensor], scalars: list[int]) -> None:
    visible = mask.dense(shape, tensors, scalars)
    if visible.dtype != torch.bool:
        raise TypeError(f"the mask is of {visible.dtype}")
    visible = visible.expand(shape)
    cpu = torch.device("cpu")
    pairs = blocks.candidates(mask, shape, tensors, scalars, BLOCK, BLOCK, cpu).expand(*shape[:2], -1, -1)
    tokens = pairs.repeat_interleave(BLOCK, 2)[:, :, : shape[2]].repeat_interleave(BLOCK, 3)[..., : shape[3]]
    if bool((visible & ~tokens).any()):
        raise ValueError("bounds over blocks lose visible keys")
    unseen = blind.blind_rows(mask, shape, tensors, scalars, cpu)[..., 0]
    if not torch.equal(unseen.expand(shape[:3]), ~visible.any(-1)):
        raise ValueError("rows that see no key are told wrong")


def _try_score(score: Score, mask: Mask, shape: blocks.Shape, tensors: list[torch.Tensor], scalars: list[int]) -> None:
    products = torch.linspace(-4, 4, shape[2] * shape[3]).view(1, 1, *shape[2:]).expand(shape)
    env = environment(shape, tensors, scalars)
    axes = [torch.arange(n).view([-1 if i == j else 1 for j in range(4)]) for i, n in enumerate(shape)]
    visible = mask.dense(shape, tensors, scalars).expand(shape)
    values = score.apply(products, env | dict(zip((B, H, Q, KV), axes, strict=True)))
    # What a stand-in makes of a tensor's own numbers says nothing.
    if not symbolic.loads(score.expr) and bool((values.isnan() & visible).any()):
        raise ValueError("the score is NaN where a key is visible")
    sink = score.sink_logits(shape, tensors, scalars, products)
    if sink is not None:
        sink.expand(*shape[:3], 1)
