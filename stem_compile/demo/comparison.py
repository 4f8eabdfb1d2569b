"""The demo's result in words and numbers: a table for a terminal, the same in Markdown, and a JSON document."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stem_compile.bench.terminal import Table
from stem_compile.bench.units import memory, seconds
from stem_compile.demo.race import Result

COLUMNS = ("", "first token", "speed-up", "memory", "density", "change of NLL", "same top-1", "pass key", "compiled in")


@dataclass(frozen=True)
class Comparison:
    """Results of one race. settings: what the numbers depend on (machine, model, tokens, dtype, ...)."""

    settings: dict[str, Any]
    results: list[Result]

    @property
    def caption(self) -> str:
        """One line that says what was measured on what."""
        s = self.settings
        return f"{s['model']}, {s['tokens']:,} tokens, {s['dtype']}, {s['machine']}"

    def rows(self) -> list[tuple[str, ...]]:
        """Cells in the order of ``COLUMNS``."""
        base = self.results[0]
        return [
            (
                r.name,
                seconds(r.time),
                f"{base.time / r.time:.2f}x",
                memory(r.peak_bytes),
                f"{r.density:.0%}",
                f"{r.nll_change:+.3f}" if r is not base else f"{r.nll:.3f} (NLL)",
                f"{r.agreement:.1%}",
                "found" if r.passkey_found else "not found",
                seconds(r.compile_seconds) if r is not base else "-",
            )
            for r in self.results
        ]

    def table(self) -> Table:
        """The same for a terminal."""
        return Table(self.caption, COLUMNS, self.rows())

    def markdown(self) -> str:
        """The table as Markdown."""
        return "\n".join([_line(COLUMNS), _line(["---", *["---:"] * (len(COLUMNS) - 1)]), *map(_line, self.rows())])

    def to_dict(self) -> dict[str, Any]:
        """{"settings": {...}, "results": [{"name", "seconds", "median_seconds", "peak_bytes", "density", "nll", ...},
        ...]}."""
        return {"settings": self.settings, "results": [{**asdict(r), "median_seconds": r.time} for r in self.results]}

    def write(self, path: Path) -> None:
        """``to_dict`` as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
