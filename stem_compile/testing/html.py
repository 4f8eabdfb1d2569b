"""A report as one page of HTML without scripts or outside files, readable on a phone and in the dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stem_compile.packages import need

TEMPLATE = Path(__file__).parent / "templates" / "check.html.j2"
MEASURED_ON = ("machine", "date", "seconds", "python", "versions")
"""Settings that say where and when, for the foot of the page."""


def page(report: dict[str, Any]) -> str:
    """The whole page. report: ``Report.to_dict``. Raises MissingPackage without jinja2."""
    need("jinja2")
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text()).render(**report, measured_on=_measured_on(report)) + "\n"


def _measured_on(report: dict[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    for name in MEASURED_ON:
        value = report["settings"].get(name)
        shown |= value if isinstance(value, dict) else {name: value} if value is not None else {}
    return shown
