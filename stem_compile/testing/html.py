"""A report as one page of HTML without scripts or outside files."""

from __future__ import annotations

from html import escape
from typing import Any

_STYLE = """
body {
  font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1f24; background: #fff;
}
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #d8dee4; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.pass { color: #14682e } .fail { color: #a40e26; font-weight: 600 }
pre { background: #f3f5f7; padding: .8rem; overflow-x: auto }
.verdict { font-size: 1.15rem; padding: .6rem .8rem; border-left: 4px solid }
@media (prefers-color-scheme: dark) {
  body { color: #e6edf3; background: #0d1117 } pre { background: #161b22 } th, td { border-color: #30363d }
  .pass { color: #56d364 } .fail { color: #ff7b72 }
}
"""


def _ratio(worst: float) -> str:
    return f"{worst:.2f}" if worst else "-"


def page(report: dict[str, Any]) -> str:
    """The whole page. report: ``Report.to_dict``."""
    results = report["results"]
    rows = "".join(
        f'<tr><td>{escape(r["name"])}</td><td class="{escape(r["verdict"])}">{escape(r["verdict"])}</td><td'
        f' class="n">{escape(r["tried"])}</td>'
        f'<td class="n">{_ratio(r["worst"])}</td><td>{escape(r["title"])}'
        f"<br><small>{escape(r['remark'])}</small></td></tr>"
        for r in results
    )
    failures = "".join(
        f"<h2>{escape(r['name'])}</h2><p>{escape(r['failure']['message'])}</p>"
        f"<pre>{escape(r['failure']['snippet'])}</pre>"
        for r in results
        if r["failure"]
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport"'
        f' content="width=device-width"><title>stem-compile check</title>'
        f'<style>{_STYLE}</style><h1>stem-compile check</h1><p class="verdict'
        f' {"pass" if report["passed"] else "fail"}">{escape(report["verdict"])}</p>'
        f"<p>{escape(report['headline'])}</p>"
        "<table><tr><th>property</th><th>verdict</th><th>examples</th><th>worst error / budget</th><th>what it"
        f" says</th></tr>{rows}</table>{failures}</html>\n"
    )
