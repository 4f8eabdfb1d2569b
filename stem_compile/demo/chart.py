"""The race as a picture: time, memory and quality side by side, one row a contender."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stem_compile.bench.units import memory, seconds
from stem_compile.demo.comparison import Comparison

BASELINE, RIVAL, STEM = "#7f7f7f", "#56b4e9", "#d55e00"
"""Grey, sky blue and vermilion of Okabe and Ito's palette: told apart by colour-blind readers and in grey print."""


def draw(comparison: Comparison, path: Path) -> None:
    """Write a PNG of ``comparison`` to ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = comparison.results
    base = results[0]
    colours = [BASELINE if i == 0 else STEM if r.name.startswith("stem") else RIVAL for i, r in enumerate(results)]
    with pyplot.rc_context(
        {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    ):
        figure, axes = pyplot.subplots(1, 3, figsize=(12, 0.55 * len(results) + 1.7), sharey=True, layout="constrained")
        _bars(
            axes[0],
            "Time to first token",
            [r.time for r in results],
            [f"{seconds(r.time)}   {base.time / r.time:.2f}x" for r in results],
            colours,
        )
        _bars(
            axes[1],
            "Memory that the prefill adds",
            [(r.peak_bytes or 0) / 2**20 for r in results],
            [memory(r.peak_bytes) for r in results],
            colours,
        )
        key = ["pass key found" if r.passkey_found else "pass key not found" for r in results]
        changes = [
            f"{r.nll_change:+.3f}   {k}" if r is not base else f"(NLL {r.nll:.3f})   {k}"
            for r, k in zip(results, key, strict=True)
        ]
        _bars(
            axes[2],
            "Change of NLL, nats a token",
            [max(r.nll_change, 0.0) for r in results],
            changes,
            colours,
            least=0.05,
        )
        axes[0].set_yticks(range(len(results)), [f"{r.name}\n{r.density:.0%} computed" for r in results])
        axes[0].invert_yaxis()
        figure.suptitle(comparison.caption, x=0.01, ha="left", fontsize=10, color="#444444")
        figure.savefig(path, dpi=150)
        pyplot.close(figure)


def _bars(
    axis: Any, title: str, values: list[float], labels: list[str], colours: list[str], least: float = 0.0
) -> None:
    bars = axis.barh(range(len(values)), values, color=colours, height=0.66)
    axis.bar_label(bars, labels, padding=4, fontsize=9)
    axis.set_title(f"{title} (less is better)", fontsize=10)
    axis.set_xlim(0, max(*values, least) * 1.6 or 1)
    axis.xaxis.set_visible(False)
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(axis="y", length=0)
