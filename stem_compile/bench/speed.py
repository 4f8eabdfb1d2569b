"""Speed of any model's prefill over prompt lengths: eager, Inductor and Stem, with how far the outputs are apart."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from stem_compile import backend
from stem_compile.bench import chart
from stem_compile.bench.contender import RIVALS, Contender
from stem_compile.bench.measure import PeakMemory, measured
from stem_compile.bench.report import Section
from stem_compile.bench.target import Target
from stem_compile.bench.terminal import Table
from stem_compile.bench.units import memory, seconds, share
from stem_compile.config import StemConfig
from stem_compile.packages import UserError
from stem_compile.passes.graph.sites import Rejected
from stem_compile.passes.pipeline import Rewrite
from stem_compile.selection import Observed, observe
from stem_compile.timing import Timing, in_turns

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ("tokens", "contender", "prefill", "speed-up", "memory", "density", "difference")


@dataclass(frozen=True)
class Row:
    """One contender at one length. seconds: median; low, high: 20th and 80th percentile. peak_bytes: memory that a call
    adds. density: computed part of the visible block pairs, mean over rewritten attentions; None where nothing was
    selected. difference: relative L2 distance of the first output to eager's."""

    name: str
    seconds: float
    low: float
    high: float
    speedup: float
    peak_bytes: int | None
    density: float | None
    difference: float


@dataclass(frozen=True)
class Length:
    """All contenders at one length. dense: why attentions stayed dense, with how many, as the backend says it."""

    tokens: int
    rows: list[Row]
    dense: dict[str, int]


@dataclass(frozen=True)
class Speed:
    """What ``bench`` measured. settings: what the numbers depend on (``machine.settings``)."""

    settings: dict[str, Any]
    lengths: list[Length]

    def to_dict(self) -> dict[str, Any]:
        """{"settings": {...}, "lengths": [{"tokens", "rows": [{"name", "seconds", ...}], "dense"}]}."""
        return {"settings": self.settings, "lengths": [dataclasses.asdict(length) for length in self.lengths]}

    @property
    def title(self) -> str:
        """What was measured on what."""
        return f"{self.settings['target']}, {self.settings['dtype']}, {self.settings['machine']}"

    def table(self) -> Table:
        """For a terminal: a blank line after each length."""
        pairs = [(length.tokens, row) for length in self.lengths for row in length.rows]
        return Table(self.title, COLUMNS, [_cells(*p) for p in pairs], ("contender",), [tokens for tokens, _ in pairs])

    def remarks(self) -> list[str]:
        """Why nothing was sparse, for every length at which that is so."""
        return [
            f"{length.tokens:,} tokens: every attention stayed dense"
            + "".join(f"; {count} of them: {words}" for words, count in length.dense.items())
            for length in self.lengths
            if length.rows[-1].density is None
        ]

    def sections(self) -> list[Section]:
        """For the page and the picture."""
        return [
            Section("Time to first token", "Medians; less is better.", draw=self._draw_seconds),
            Section("Speed-up over eager", "More is better.", draw=self._draw_speedups),
            Section("All numbers", " ".join(self.remarks()), table=self.table()),
        ]

    def _draw_seconds(self, axes: Axes) -> None:
        chart.lines(axes, self._series(lambda row: row.seconds), "tokens", "seconds", lengths=True)

    def _draw_speedups(self, axes: Axes) -> None:
        chart.lines(axes, self._series(lambda row: row.speedup), "tokens", "times eager", lengths=True)

    def _series(self, value: Callable[[Row], float]) -> dict[str, list[tuple[float, float]]]:
        series: dict[str, list[tuple[float, float]]] = {}
        for length in self.lengths:
            for row in length.rows:
                series.setdefault(row.name, []).append((length.tokens, value(row)))
        return series


def _cells(tokens: int, row: Row) -> tuple[str, ...]:
    return (
        f"{tokens:,}",
        row.name,
        seconds(row.seconds),
        f"{row.speedup:.2f}x",
        memory(row.peak_bytes),
        share(row.density),
        f"{row.difference:.1e}",
    )


def lengths(target: Target, options: Mapping[str, Any]) -> list[int]:
    """Lengths at which ``options`` do something: the power of two from which on attention may be sparse, and twice
    that. Raises UserError where the model has positions for fewer tokens."""
    shortest = max(512, StemConfig.from_options(options).shortest)
    start = 1 << (shortest - 1).bit_length()
    if shortest > target.longest:
        raise UserError(
            f"{target.name} has positions for {target.longest:,} tokens, and attention stays dense below {shortest:,};"
            " give -o min_length=0 with -o budget=0.25 to see it sparse, or --tokens to time it as it is"
        )
    return [n for n in (start, 2 * start) if n <= target.longest] or [target.longest]


def bench(
    target: Target,
    lengths: Sequence[int],
    options: dict[str, Any],
    repeats: int,
    device: str,
    doing: Callable[[str], None] = lambda what: None,
) -> Iterator[Length]:
    """Each length in turn; contenders take turns, and the first call of each (compilation) is not timed. doing: told
    what is at work. Raises UserError where the model itself fails."""
    entered = [*RIVALS, Contender("stem", "stem", options)]
    functions = {c.name: c.compile(target.model, fullgraph=False) for c in entered}
    # The first call of a contender at any length compiles; its refusals hold for later lengths that reuse the graph.
    refused: dict[str, int] = {}
    for tokens in lengths:
        args, kwargs = target.inputs(tokens)
        calls = {name: functools.partial(f, *args, **kwargs) for name, f in functions.items()}
        outputs: dict[str, torch.Tensor] = {}
        densities: dict[str, float | None] = {}
        for name, call in calls.items():
            doing(f"{tokens:,} tokens: {name}, first run")
            selections: list[Observed] = []
            rewrites: list[Rewrite] = []
            try:
                with observe(selections.append), backend.listen(rewrites.append):
                    output = measured(device, call).output
            except Exception as error:
                if (own := target.explain_failure(tokens, error)) is not None:
                    raise own from error
                raise
            outputs[name] = first_tensor(output).float().cpu()
            densities[name] = statistics.fmean(s.density for s in selections) if selections else None
            if rewrites:
                refused = Counter(hit.words for r in rewrites for hit in r.attentions if isinstance(hit, Rejected))
            del output, selections, rewrites
        peaks, times = _timed(calls, f"{tokens:,} tokens", repeats, device, doing)
        base, reference = times[entered[0].name], outputs[entered[0].name]
        rows = [
            Row(
                name,
                t.median / 1e3,
                t.low / 1e3,
                t.high / 1e3,
                base.median / t.median,
                peaks[name],
                densities[name],
                float((outputs[name] - reference).norm() / reference.norm().clamp(min=1e-30)),
            )
            for name, t in times.items()
        ]
        yield Length(tokens, rows, dict(refused))


def _timed(
    calls: Mapping[str, Callable[[], object]], what: str, repeats: int, device: str, doing: Callable[[str], None]
) -> tuple[dict[str, int | None], dict[str, Timing]]:
    """(bytes added at most, times) of each call."""
    peak = PeakMemory(device)
    peaks: dict[str, int | None] = dict.fromkeys(calls)

    def before(name: str, turn: int) -> None:
        doing(f"{what}: {name}, run {turn + 1} of {repeats}")
        peak.start()

    def after(name: str, _: float) -> None:
        if (added := peak.bytes()) is not None:
            peaks[name] = max(peaks[name] or 0, added)

    with torch.inference_mode():
        return peaks, in_turns(calls, device, turns=repeats, before=before, after=after)


def first_tensor(output: Any) -> torch.Tensor:
    """The first floating-point tensor of a nested output: a language model's logits."""
    if isinstance(logits := getattr(output, "logits", None), torch.Tensor):
        return logits
    leaves = torch.utils._pytree.tree_leaves(output)
    return next(x for x in leaves if isinstance(x, torch.Tensor) and x.is_floating_point())
