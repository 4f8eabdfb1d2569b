"""Charts in one style, drawn into matplotlib axes: readable in grey print, by colour-blind readers and on a phone."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#7f7f7f", "#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#0072b2")
"""Grey first, for what the others are compared with, then Okabe and Ito's colours."""
MARKERS = "osD^vPX"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
}
Draw = Callable[["Axes"], None]
Points = Sequence[tuple[float, float]]


COLUMNS = 3
"""Drawings beside each other in a picture."""


def _figure(draws: Sequence[tuple[str, Draw]], width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(draws))
    rows = -(-len(draws) // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    places = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (title, draw) in zip(places, draws):
        draw(axes)
        axes.set_title(title, fontsize=10)
    for axes in places[len(draws) :]:
        axes.set_visible(False)
    return figure


def png(draws: Sequence[tuple[str, Draw]], caption: str, path: Path) -> None:
    """Write ``draws``, (title, function of the axes), side by side to ``path``."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = _figure(draws, 5.0, 3.6)
        figure.suptitle(caption, x=0.01, ha="left", fontsize=9, color="#444444")
        figure.savefig(path, dpi=150)


def svg(title: str, draw: Draw) -> str:
    """One drawing as an <svg> element that scales with the page; same drawing, same text."""
    import matplotlib

    out = io.StringIO()
    # Salted by the title, so that two drawings on a page do not share the names of their clip paths.
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):
        _figure([("", draw)], 5.0, 3.6).savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def lines(
    axes: Axes,
    series: Mapping[str, Points],
    x: str,
    y: str,
    *,
    lengths: bool = False,
    log: bool = False,
    bound: float | None = None,
) -> None:
    """A line with markers for each of ``series``, (x, y) points. lengths: x are token counts, on a log scale. log: y is
    on a log scale. bound: a dashed line at this y."""
    for i, (name, points) in enumerate(series.items()):
        points = sorted(points)
        axes.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            marker=MARKERS[i % len(MARKERS)],
            color=PALETTE[i % len(PALETTE)],
            label=name,
        )
    if bound is not None:
        axes.axhline(bound, linestyle="--", color="#444444", linewidth=1)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    if lengths:
        ticks = sorted({p[0] for points in series.values() for p in points})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{t:,.0f}" for t in ticks])
        axes.minorticks_off()
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    if len(series) > 1:
        axes.legend(fontsize=8, frameon=False)


def heatmap(
    axes: Axes, values: Sequence[Sequence[float]], x: Sequence[str], y: Sequence[str], x_label: str, y_label: str
) -> None:
    """Shares in [0, 1] as coloured cells with their number. values: a row for each of ``y``."""
    axes.imshow(values, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(x)), x)
    axes.set_yticks(range(len(y)), y)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for row, cells in enumerate(values):
        for column, value in enumerate(cells):
            colour = "black" if value > 0.6 else "white"
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", color=colour, fontsize=9)
