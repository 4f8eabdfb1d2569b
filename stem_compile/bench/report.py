"""Results as files: JSON with every number, a picture, and one self-contained page of HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stem_compile.bench import chart
from stem_compile.bench.terminal import Table

TEMPLATE = Path(__file__).parent / "templates" / "report.html.j2"


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, words, and a table or a chart (a function that draws into matplotlib axes)."""

    heading: str
    words: str = ""
    table: Table | None = None
    draw: chart.Draw | None = None


class Results(Protocol):
    """What a command measured."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the numbers depend on (``machine.settings``)."""

    @property
    def title(self) -> str:
        """What was measured on what, in a line."""

    def to_dict(self) -> dict[str, Any]:
        """Every number, for JSON."""

    def sections(self) -> Sequence[Section]:
        """Charts and tables in the order of the page."""


def write(results: Results, folder: Path, name: str, drawn: bool = True) -> None:
    """Write ``name``.json into ``folder``; with ``drawn`` also .png and .html, which need matplotlib and jinja2."""
    (folder / f"{name}.json").write_text(json.dumps(results.to_dict(), indent=2) + "\n")
    if not drawn:
        return
    sections = results.sections()
    chart.png([(s.heading, s.draw) for s in sections if s.draw is not None], results.title, folder / f"{name}.png")
    (folder / f"{name}.html").write_text(page(results, f"stem-compile {name}"))


def written(folder: Path, name: str, drawn: bool = True) -> str:
    """Where ``write`` put its files, in a line."""
    kinds = ("json", "png", "html") if drawn else ("json",)
    return "written: " + "   ".join(str(folder / f"{name}.{kind}") for kind in kinds)


def page(results: Results, heading: str) -> str:
    """The page: no scripts, no outside files, readable on a phone and in the dark."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    sections = [
        {
            "heading": section.heading,
            "words": section.words,
            "table": section.table,
            "chart": None if section.draw is None else Markup(chart.svg(section.heading, section.draw)),
        }
        for section in results.sections()
    ]
    text = environment.from_string(TEMPLATE.read_text()).render(
        heading=heading, title=results.title, settings=results.settings, sections=sections
    )
    return text + "\n"
