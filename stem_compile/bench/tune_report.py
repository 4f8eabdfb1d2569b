"""The results of ``stem-compile tune`` as words, table, charts and JSON, with what was not tested."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stem_compile.bench import chart
from stem_compile.bench.quality_report import KL_FLOOR
from stem_compile.bench.report import Section
from stem_compile.bench.terminal import Table
from stem_compile.bench.tune import Bound, Search, Trial, to_dict
from stem_compile.bench.units import seconds, share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ("options", "KL, worst text", "change of NLL", "same top-1", "density", "call", "first token", "bound")


@dataclass(frozen=True)
class Tuning:
    """What ``tune`` found. settings: ``machine.settings`` with "texts" and "tokens"."""

    settings: dict[str, Any]
    bound: Bound
    search: Search

    @property
    def title(self) -> str:
        """What was tuned on what."""
        s = self.settings
        return f"{s['target']}, {s['tokens']:,} tokens, {s['dtype']}, {s['machine']}"

    @property
    def options(self) -> dict[str, Any] | None:
        """The fastest options within the bound; None where dense attention is the answer."""
        return None if self.search.best is None else self.search.best.options

    def to_dict(self) -> dict[str, Any]:
        """{"options", "bound", "settings", "search": {"trials", ...}, "not tested"}."""
        return {
            "options": self.options,
            "bound": {"kl": self.bound.kl, "nll": self.bound.nll},
            "settings": self.settings,
            "search": to_dict(self.search),
            "not tested": self.untested(),
        }

    def untested(self) -> list[str]:
        """What the result says nothing about."""
        s = self.settings
        return [
            f"other lengths than {s['tokens']:,} tokens (shorter prompts compute a larger part of their blocks)",
            f"other texts and languages than: {', '.join(s['texts'])}",
            "batches, padding, packed documents, cached prefixes and chunked prefill (stem-compile check does)",
            f"other devices and dtypes than {s['device']} and {s['dtype']}",
            "what the model writes after the prompt (stem-compile quality asks for pass keys)",
        ]

    def words(self) -> str:
        """The answer in a few lines."""
        best = self.search.best
        if best is None:
            within = any(t.within for t in self.search.trials)
            why = "dense attention is faster than any setting" if within else "no budget that was tried is"
            return f"{why} within {self.bound.words}: leave this model dense at {self.settings['tokens']:,} tokens"
        text = ", ".join(f"{k}={v!r}" for k, v in best.options.items())
        lines = [f"fastest within {self.bound.words}: {text}"]
        if best.final_seconds is not None and self.search.eager_seconds and self.search.inductor_seconds:
            lines.append(
                f"time to first token: eager {seconds(self.search.eager_seconds)}, inductor"
                f" {seconds(self.search.inductor_seconds)}, stem {seconds(best.final_seconds)}"
                f" ({self.search.eager_seconds / best.final_seconds:.2f}x over eager)"
            )
        return "\n".join(lines)

    def table(self) -> Table:
        """Every setting that was tried, best first."""
        trials = sorted(self.search.trials, key=lambda t: (not t.within, t.final_seconds or float("inf"), t.seconds))
        return Table(self.title, COLUMNS, [_row(t) for t in trials])

    def sections(self) -> list[Section]:
        """For the page."""
        return [
            Section("Answer", self.words()),
            Section("KL against density", "Worst text; the line is the bound.", draw=self._draw_density),
            Section("KL against the time of a call", "Worst text, the rest of the model eager.", draw=self._draw_time),
            Section("Every setting that was tried", "", table=self.table()),
            Section("Not tested", "; ".join(self.untested()) + "."),
        ]

    def _draw_density(self, axes: Axes) -> None:
        chart.lines(
            axes, self._series("density"), "part of the block pairs computed", "KL, nats", log=True, bound=self.bound.kl
        )

    def _draw_time(self, axes: Axes) -> None:
        chart.lines(axes, self._series("seconds"), "seconds", "KL, nats", log=True, bound=self.bound.kl)

    def _series(self, x: str) -> dict[str, list[tuple[float, float]]]:
        """Points by family: the options without their budget."""
        series: dict[str, list[tuple[float, float]]] = {}
        for trial in self.search.trials:
            family = ", ".join(f"{k}={v}" for k, v in trial.options.items() if k != "budget") or "defaults"
            at = getattr(trial, x)
            if at is not None:
                series.setdefault(family, []).append((at, max(_worst(trial, "kl") or 0.0, KL_FLOOR)))
        return series


def _worst(trial: Trial, measure: str) -> float | None:
    values = [means[measure] for means in trial.texts.values() if measure in means]
    return (min(values) if measure == "same top-1" else max(values)) if values else None


def _row(trial: Trial) -> tuple[str, ...]:
    nll = _worst(trial, "nll change")
    return (
        ", ".join(f"{k}={v}" for k, v in trial.options.items()),
        f"{_worst(trial, 'kl'):.4f}",
        "-" if nll is None else f"{nll:+.4f}",
        share(_worst(trial, "same top-1"), 1),
        share(trial.density),
        seconds(trial.seconds),
        "-" if trial.final_seconds is None else seconds(trial.final_seconds),
        "within" if trial.within else "beyond",
    )
