"""The results of ``stem-compile quality`` as a table, as charts and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stem_compile.bench import chart
from stem_compile.bench.quality import Outcome
from stem_compile.bench.report import Section
from stem_compile.bench.terminal import Table
from stem_compile.bench.units import seconds, share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = (
    "contender",
    "first token",
    "speed-up",
    "density",
    "KL",
    "change of NLL",
    "same top-1",
    "one key",
    "four keys",
)
KL_FLOOR = 1e-6
"""Least KL on a logarithmic axis, nats."""


@dataclass(frozen=True)
class Quality:
    """What ``quality`` measured. settings: ``machine.settings`` with "texts" and "tokens". outcomes: the first is what
    the others are compared with."""

    settings: dict[str, Any]
    outcomes: list[Outcome]

    @property
    def title(self) -> str:
        """What was measured on what."""
        s = self.settings
        return f"{s['target']}, {s['tokens']:,} tokens, {s['dtype']}, {s['machine']}"

    def to_dict(self) -> dict[str, Any]:
        """{"settings": {...}, "outcomes": [{"name", "seconds", "density", "texts", "keys", ...}]}."""
        return {"settings": self.settings, "outcomes": [o.to_dict() for o in self.outcomes]}

    def table(self) -> Table:
        """One row a contender; means over the texts."""
        return Table(self.title, COLUMNS, [self._row(o) for o in self.outcomes])

    def _row(self, outcome: Outcome) -> tuple[str, ...]:
        base = self.outcomes[0]
        kl, nll = outcome.mean("kl"), outcome.mean("nll change")
        timed = outcome.seconds > 0 and base.seconds > 0
        return (
            outcome.name,
            seconds(outcome.seconds) if timed else "-",
            f"{base.seconds / outcome.seconds:.2f}x" if timed else "-",
            share(outcome.density),
            "-" if kl is None else f"{kl:.4f}",
            "-" if nll is None else f"{nll:+.4f}",
            share(outcome.mean("same top-1"), 1),
            share(outcome.answered(1)),
            share(outcome.answered(4)),
        )

    def sections(self) -> list[Section]:
        """Charts first, then the table and the words."""
        sparse = [o for o in self.outcomes[1:] if o.texts]
        out = [
            Section("All numbers", self.words, table=self.table()),
            Section("KL against density", "Second half of each text; less of both is better.", draw=self._draw_density),
        ]
        if all(o.seconds > 0 for o in self.outcomes):
            out.append(Section("KL against time to first token", "Less of both is better.", draw=self._draw_time))
        out.append(Section("KL by position", "Mean over the texts.", draw=self._draw_positions))
        if any(o.layers for o in sparse):
            words = "Relative error of the hidden states, accumulated over the layers before."
            out.append(Section("Error by layer", words, draw=self._draw_layers))
        for keys, words in ((1, "One key a text."), (4, "Four keys in one text.")):
            for outcome in self.outcomes:
                if outcome.answered(keys) is not None:
                    out.append(self._key_map(outcome, keys, words))
        return out

    @property
    def words(self) -> str:
        """What the columns mean."""
        return (
            f"Texts: {', '.join(self.settings['texts'])}. KL, change of NLL and equal top-1 tokens are means over the"
            " second half of each text, against the first row. Keys: questions after the text that were answered."
        )

    def _key_map(self, outcome: Outcome, keys: int, words: str) -> Section:
        lengths = sorted({t for n, t, _ in outcome.keys if n == keys})
        depths = sorted({p for n, _, p in outcome.keys if n == keys})
        values = [[float(outcome.keys.get((keys, t, p), False)) for t in lengths] for p in depths]

        def draw(axes: Axes) -> None:
            names = [f"{t:,}" for t in lengths], [f"{p:.0%}" for p in depths]
            chart.heatmap(axes, values, *names, "tokens", "depth of the key")

        return Section(f"Pass keys, {'one' if keys == 1 else 'four'}: {outcome.name}", words, draw=draw)

    def _draw_density(self, axes: Axes) -> None:
        chart.lines(axes, self._by_text(lambda o: o.density), "part of the block pairs computed", "KL, nats", log=True)

    def _draw_time(self, axes: Axes) -> None:
        chart.lines(axes, self._by_text(lambda o: o.seconds), "seconds to first token", "KL, nats", log=True)

    def _by_text(self, x: Any) -> dict[str, list[tuple[float, float]]]:
        return {
            text: [(x(o), max(o.texts[text]["kl"], KL_FLOOR)) for o in self.outcomes[1:] if text in o.texts and x(o)]
            for text in self.settings["texts"]
        }

    def _draw_positions(self, axes: Axes) -> None:
        series = {o.name: [(end, kl) for end, kl, _ in o.positions] for o in self.outcomes[1:] if o.positions}
        chart.lines(axes, series, "position", "KL, nats")

    def _draw_layers(self, axes: Axes) -> None:
        series = {o.name: _numbered(o.layers) for o in self.outcomes[1:] if o.layers}
        chart.lines(axes, series, "layer", "relative error")


def _numbered(values: Sequence[float]) -> list[tuple[float, float]]:
    return [(float(i), value) for i, value in enumerate(values, 1)]
