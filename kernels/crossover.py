"""From which length on selecting is faster than dense attention: measured on the device itself, once, and kept on disk.

Short prompts, few heads and budgets near 1 lose more to selection than they save; where that ends depends on the
device, the element type and the heads. Dense attention as torch runs it (with a Boolean mask where the graph gives one)
races selection and sparse attention on random data at a few lengths. The answer is a file beside the generated modules.
A CPU is never measured.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F

from stem_compile.kernels import cache, launch
from stem_compile.timing import in_turns

log = logging.getLogger(__name__)

LENGTHS = (2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
NEVER = 1 << 40
"""Crossover where dense attention won at every length measured."""
MARGIN = 0.98
"""Part of dense attention's time that selecting may take: a tie stays dense."""
ROUNDS = 7


def shortest(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: str, masked: bool, least: int) -> int:
    """Fewest keys, of ``least`` or more, for which selecting wins; ``least`` where nothing is measured.

    q: [B, H, q_len, d], k: [B, Hk, kv_len, d], v: [B, Hk, kv_len, dv], fake or real; lengths and batch are not read.
    masked: dense attention gets a mask tensor.
    """
    if q.device.type != "cuda" or launch.target("cuda") is None:
        return least
    heads, key_heads = int(q.shape[1]), int(k.shape[1])
    return max(
        least, _crossover(q.device, q.dtype, heads, key_heads, int(q.shape[-1]), int(v.shape[-1]), spec, masked, least)
    )


@functools.lru_cache(maxsize=256)
def _crossover(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    key_heads: int,
    head_dim: int,
    value_dim: int,
    spec: str,
    masked: bool,
    least: int,
) -> int:
    key = (
        f"{cache.machine(device)} {dtype} heads {heads}/{key_heads} dims {head_dim}/{value_dim} masked {masked} from"
        f" {least} [{spec}]"
    )
    known = cache.recall("crossover", key)
    if known is not None:
        return int(known["keys"])
    try:
        # A fresh thread has none of the modes (fake tensors, gradients) of the compilation that asks.
        with ThreadPoolExecutor(1) as alone:
            times = alone.submit(
                _race, device, dtype, heads, key_heads, head_dim, value_dim, spec, masked, least
            ).result()
    except Exception:
        log.exception("the crossover could not be measured; attentions from %d keys on are rewritten", least)
        return least
    found = crossing(times)
    cache.store("crossover", key, {"keys": found, "ms": {str(n): pair for n, pair in times.items()}})
    return found


def crossing(times: dict[int, tuple[float, float]]) -> int:
    """The length from which on selecting wins at every length measured. times: length -> (dense ms, selecting ms)."""
    found = NEVER
    for length in sorted(times, reverse=True):
        dense, selecting = times[length]
        if selecting > MARGIN * dense:
            break
        found = length
    return found


@torch.inference_mode()
def _race(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    key_heads: int,
    head_dim: int,
    value_dim: int,
    spec: str,
    masked: bool,
    least: int,
) -> dict[int, tuple[float, float]]:
    target = launch.target("cuda")
    assert target is not None
    times: dict[int, tuple[float, float]] = {}
    mask, scale = "kv <= q", head_dim**-0.5
    with torch.cuda.device(device):
        for length in sorted({n for n in LENGTHS if n >= least} or {least}):
            if (
                masked and heads * length**2 > 1 << 33
            ):  # with a mask torch may write all scores out: many GB from here on
                times[length] = (math.inf, 0.0)
                break
            q, k, v = (
                torch.randn(1, h, length, d, device=device, dtype=dtype)
                for h, d in ((heads, head_dim), (key_heads, head_dim), (key_heads, value_dim))
            )
            seen = torch.ones(length, length, dtype=torch.bool, device=device).tril_()[None, None] if masked else None

            def dense(q: Any = q, k: Any = k, v: Any = v, seen: Any = seen) -> None:
                if masked:  # no kernel takes both a mask and fewer key heads; models repeat them
                    k, v = (x.repeat_interleave(heads // key_heads, 1) for x in (k, v))
                F.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    attn_mask=seen,
                    is_causal=not masked,
                    scale=scale,
                    enable_gqa=heads != key_heads and not masked,
                )

            def selecting(q: Any = q, k: Any = k, v: Any = v) -> None:
                kernel, chooser = target.kernel_name(q, k, v, mask, spec), target.select_name(q, k, v, mask, spec)
                chosen = target.select(q, k, v, [], [], mask, scale, spec, chooser)
                target.attend(q, k, v, *chosen, [], [], mask, scale, spec, kernel)

            try:
                times[length] = _milliseconds(dense, selecting)
            except torch.OutOfMemoryError:  # of dense attention with its mask
                times[length] = (math.inf, 0.0)
            # Far beyond the crossover nothing changes any more.
            if times[length][1] < 0.5 * times[length][0]:
                break
        torch.cuda.empty_cache()
    return times


def _milliseconds(*runs: Callable[[], None]) -> tuple[float, float]:
    """Medians of both, taken in turns. Other work goes before each, as in a model, so that launching does not count."""
    before = torch.randn(4096, 4096, device="cuda", dtype=torch.float16)

    def queue() -> None:
        for _ in range(10):
            before @ before

    calls = {str(i): run for i, run in enumerate(runs)}
    first, second = in_turns(calls, "cuda", turns=ROUNDS, warmup=2, clock="device", queued_before=queue).values()
    return first.median, second.median
