"""From which length on selecting is faster than dense attention: measured on the device itself, once, and kept on disk.

Short prompts, few heads and budgets near 1 lose more to selection than they save; where that ends depends on the
device, the element type and the heads. Dense attention as torch runs it (with a Boolean mask where the graph gives one)
races selection and sparse attention on random data at a few lengths. The answer is a file beside the generated modules.
Whether a device is measured at all, and how, its target says.
"""

from __future__ import annotations

import functools
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from stem_compile.kernels import cache, launch
from stem_compile.kernels.contract import Stopwatch
from stem_compile.selection import Attention

log = logging.getLogger(__name__)

LENGTHS = (2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
NEVER = 1 << 40
"""Crossover where dense attention won at every length measured."""
MARGIN = 0.98
"""Part of dense attention's time that selecting may take: a tie stays dense."""


@dataclass(frozen=True)
class Question:
    """What a crossover depends on. least: fewest keys that are asked about. masked: dense attention gets a mask
    tensor. spec_text: ``SelectionSpec.text()``."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    spec_text: str
    masked: bool
    least: int

    def __str__(self) -> str:
        return (
            f"{self.dtype} heads {self.heads}/{self.key_heads} dims {self.head_dim}/{self.value_dim} masked"
            f" {self.masked} from {self.least} [{self.spec_text}]"
        )


def shortest(attention: Attention, masked: bool, least: int) -> int:
    """Fewest keys, of ``least`` or more, for which selecting wins; ``least`` where nothing is measured.

    attention: of fake or real tensors; lengths and batch are not read. masked: dense attention gets a mask tensor.
    """
    q, k, v = attention.q, attention.k, attention.v
    target = launch.target(q.device.type)
    stopwatch = None if target is None else target.stopwatch(q.device)
    if stopwatch is None:
        return least
    heads, key_heads, head_dim, value_dim = (int(n) for n in (q.shape[1], k.shape[1], q.shape[-1], v.shape[-1]))
    question = Question(q.device, q.dtype, heads, key_heads, head_dim, value_dim, attention.spec_text, masked, least)
    return max(least, _crossover(question, stopwatch))


@functools.lru_cache(maxsize=256)
def _crossover(question: Question, stopwatch: Stopwatch) -> int:
    key = f"{stopwatch.machine} {question}"
    known = cache.recall("crossover", key)
    if known is not None:
        return int(known["keys"])
    try:
        # A fresh thread has none of the modes (fake tensors, gradients) of the compilation that asks.
        with ThreadPoolExecutor(1) as alone:
            times = alone.submit(_race, question, stopwatch).result()
    except Exception:
        log.exception("the crossover could not be measured; attentions from %d keys on are rewritten", question.least)
        return question.least
    keys = crossing(times)
    cache.store("crossover", key, {"keys": keys, "ms": {str(n): pair for n, pair in times.items()}})
    return keys


def crossing(times: dict[int, tuple[float, float]]) -> int:
    """The length from which on selecting wins at every length measured. times: length -> (dense ms, selecting ms)."""
    crossover = NEVER
    for length in sorted(times, reverse=True):
        dense, selecting = times[length]
        if selecting > MARGIN * dense:
            break
        crossover = length
    return crossover


@torch.inference_mode()
def _race(question: Question, stopwatch: Stopwatch) -> dict[int, tuple[float, float]]:
    """Length -> (dense ms, selecting ms), up to where nothing changes any more."""
    times: dict[int, tuple[float, float]] = {}
    for length in sorted({n for n in LENGTHS if n >= question.least} or {question.least}):
        # With a mask torch may write all scores out: many GB from here on.
        if question.masked and question.heads * length**2 > 1 << 33:
            times[length] = (math.inf, 0.0)
            break
        try:
            times[length] = _times(question, stopwatch, length)
        except torch.OutOfMemoryError:  # of dense attention with its mask
            times[length] = (math.inf, 0.0)
        if times[length][1] < 0.5 * times[length][0]:
            break
    return times


def _times(question: Question, stopwatch: Stopwatch, length: int) -> tuple[float, float]:
    """(dense ms, selecting ms) of causal attention on random data."""
    q, k, v = (
        torch.randn(1, heads, length, dim, device=question.device, dtype=question.dtype)
        for heads, dim in (
            (question.heads, question.head_dim),
            (question.key_heads, question.head_dim),
            (question.key_heads, question.value_dim),
        )
    )
    masked, grouped = question.masked, question.heads != question.key_heads
    target = launch.target(question.device.type)
    assert target is not None
    attention = Attention(q, k, v, "kv <= q", question.head_dim**-0.5, question.spec_text)
    names = target.kernels(attention)
    size = length if masked else 0
    visible = torch.ones(size, size, dtype=torch.bool, device=question.device).tril_()[None, None]

    def dense() -> None:
        # No kernel takes both a mask and fewer key heads; models repeat them.
        keys, values = (x.repeat_interleave(attention.group, 1) if masked else x for x in (k, v))
        mask = visible if masked else None
        F.scaled_dot_product_attention(
            q, keys, values, mask, is_causal=not masked, scale=attention.scale, enable_gqa=grouped and not masked
        )

    def selecting() -> None:
        # As the operators do it: nothing is kept between the two.
        fresh = Attention(q, k, v, "kv <= q", attention.scale, question.spec_text)
        target.attend(fresh, fresh.selection(*target.select(fresh, names.select)), names.attend)

    return stopwatch.milliseconds(dense, selecting)
