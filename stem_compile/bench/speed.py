"""Speed of any model's prefill over prompt lengths: eager, Inductor and Stem, with how far the outputs are apart."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from stem_compile.bench.measure import run
from stem_compile.bench.target import Target
from stem_compile.demo.race import Contender
from stem_compile.demo.report import memory, seconds
from stem_compile.selection import Observed, observe

RIVALS = (Contender("eager"), Contender("inductor", "inductor"))
"""Both dense; the first is what the others are compared with."""


@dataclass(frozen=True)
class Row:
    """One contender at one length. difference: relative L2 distance of the first output to eager's. density: mean over
    rewritten attentions."""

    tokens: int
    name: str
    seconds: float
    speedup: float
    peak_bytes: int | None
    density: float | None
    difference: float


def bench(
    target: Target,
    lengths: Sequence[int],
    options: dict[str, Any],
    repeats: int,
    device: str,
    tell: Callable[[str], None],
) -> Iterator[Row]:
    """Rows length by length, contenders in turns; the first call of each at a length (compilation) is not timed."""
    entered = [*RIVALS, Contender("stem", "stem", options)]
    functions = [
        target.model if c.backend is None else torch.compile(target.model, backend=c.backend, options=c.options or None)
        for c in entered
    ]
    for tokens in lengths:
        args, kwargs = target.inputs(tokens)
        outputs, densities = [], []
        times: list[list[float]] = [[] for _ in entered]
        peaks: list[int | None] = [None for _ in entered]
        for contender, function in zip(entered, functions, strict=True):
            tell(f"{tokens} tokens: {contender.name}, first run")
            made: list[Observed] = []
            with observe(made.append):
                first = run(device, function, *args, **kwargs)
            outputs.append(first_tensor(first.output).float().cpu())
            densities.append(statistics.fmean(m.density for m in made) if made else None)
            del first
        for turn in range(repeats):
            for i, (contender, function) in enumerate(zip(entered, functions, strict=True)):
                tell(f"{tokens} tokens: {contender.name}, run {turn + 1} of {repeats}")
                timed = run(device, function, *args, **kwargs)
                times[i].append(timed.seconds)
                peaks[i] = timed.peak_bytes if peaks[i] is None else max(peaks[i] or 0, timed.peak_bytes or 0)
                del timed
        medians = [statistics.median(t) for t in times]
        for i, contender in enumerate(entered):
            away = float((outputs[i] - outputs[0]).norm() / outputs[0].norm().clamp(min=1e-30))
            yield Row(tokens, contender.name, medians[i], medians[0] / medians[i], peaks[i], densities[i], away)


def first_tensor(output: Any) -> torch.Tensor:
    """The first floating-point tensor of a nested output: a language model's logits."""
    if isinstance(logits := getattr(output, "logits", None), torch.Tensor):
        return logits
    leaves = torch.utils._pytree.tree_leaves(output)
    return next(x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point())


def table(title: str, rows: Sequence[Row]) -> Table:
    """Rich table of ``rows``, a line under each length."""
    out = Table(title=title, title_justify="left")
    for name in ("tokens", "", "prefill", "speed-up", "memory", "density", "difference"):
        out.add_column(name, justify="left" if not name else "right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        density = "-" if row.density is None else f"{row.density:.0%}"
        cells = (
            f"{row.tokens:,}",
            row.name,
            seconds(row.seconds),
            f"{row.speedup:.2f}x",
            memory(row.peak_bytes),
            density,
            f"{row.difference:.1e}",
        )
        out.add_row(*cells, end_section=following is None or following.tokens != row.tokens)
    return out
