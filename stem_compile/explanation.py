"""What happens to a model's attentions, and why.

``stem_compile.explain(model, options)(*args, **kwargs)`` compiles and runs the model once, like
``torch._dynamo.explain``. ``stem_compile.report(compiled)`` and ``last_report()`` describe a compiled model as it is
running, without a run of their own. Densities are those of the blocks really selected in the last run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import html
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters

from stem_compile import backend, running
from stem_compile.config import StemConfig
from stem_compile.passes import pipeline
from stem_compile.running import Site

COLUMNS = ("name", "decision", "mask", "density", "kernel", "q_shape", "k_shape")
DROPPED = ("k_shape", "q_shape", "kernel")
"""Columns that a narrow terminal goes without, in this order."""


@dataclass
class Explanation:
    """``print`` it for a table, in a notebook show it. Equal layers are one line there; ``sites`` has them all.

    graphs: number of compiled graphs. sites: attentions in execution order, one entry a call of a graph that is called
    several times. breaks: what broke the model's graph, in Dynamo's words. recompilations: graphs compiled for what had
    one already. notes: what else to know.
    """

    graphs: int = 0
    sites: list[Site] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)
    recompilations: int = 0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """{"graphs", "sites": [``Site.to_dict()``, ...], "breaks", "recompilations", "notes"}."""
        return {
            "graphs": self.graphs,
            "sites": [site.to_dict() for site in self.sites],
            "breaks": list(self.breaks),
            "recompilations": self.recompilations,
            "notes": list(self.notes),
        }

    @property
    def headline(self) -> str:
        """How much was rewritten, in one line."""
        rewritten = sum(site.decision == "rewritten" for site in self.sites)
        parts = [
            f"{self.graphs} graph{'s' * (self.graphs != 1)}",
            f"{len(self.sites)} attention{'s' * (len(self.sites) != 1)}",
            f"{rewritten} rewritten",
        ]
        if self.recompilations:
            parts.append(f"{self.recompilations} recompilation{'s' * (self.recompilations != 1)}")
        return ", ".join(parts)

    def __str__(self) -> str:
        width = shutil.get_terminal_size((120, 24)).columns
        lines = [self.headline, *_table([_row(group) for group in _folded(self.sites)], width)]
        lines += [f"{name}: {detail}" for name, detail in self._details()]
        lines += [f"graph break: {text}" for text in self.breaks]
        lines += self.notes
        return "\n".join(part for line in lines for part in _wrapped(line, width))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = [_row(group) for group in _folded(self.sites)]
        head = "".join(f"<th>{c}</th>" for c in COLUMNS)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(r[c])}</td>" for c in COLUMNS) + "</tr>" for r in cells)
        said = [f"{name}: {detail}" for name, detail in self._details()]
        said += [*(f"graph break: {text}" for text in self.breaks), *self.notes]
        rest = "".join(f"<p>{html.escape(text)}</p>" for text in said)
        return f"<p>{html.escape(self.headline)}</p><table><tr>{head}</tr>{body}</table>{rest}"

    def _details(self) -> list[tuple[str, str]]:
        return [(_name(group), group[0].detail) for group in _folded(self.sites) if group[0].detail]


def explain(
    model: Callable[..., Any],
    options: Mapping[str, Any] | StemConfig | None = None,
    *,
    graphs: str | Path | None = None,
) -> Callable[..., Explanation]:
    """Function of the model's arguments that compiles and runs ``model`` once, without gradients, and tells what
    happened to every attention.

    graphs: folder for the graph after each pass, as text; made where it is not there. Raises OptionError for wrong
    options. Nothing is left compiled: Dynamo is reset before and after.
    """
    config = dataclasses.replace(StemConfig.from_options(options), inner="eager", mode=None, when_dense="silent")

    def run(*args: Any, **kwargs: Any) -> Explanation:
        explanation = Explanation()
        if torch.is_grad_enabled():
            explanation.notes.append("Run without gradients; with gradients enabled nothing is rewritten.")

        def compiled_graph(_: pipeline.Rewrite) -> None:
            explanation.graphs += 1

        def ran(graph: running.Graph) -> None:
            explanation.sites += [dataclasses.replace(site) for site in graph.measured()]

        torch._dynamo.reset()
        counters.clear()
        # A partial, not a function of ours: the model is told from others by what torch.compile makes.
        compiled = torch.compile(model, backend=functools.partial(backend.stem, options=config))
        dumps = written_to(Path(graphs)) if graphs is not None else contextlib.nullcontext()
        with torch.no_grad(), backend.listen(compiled_graph), running.listen_to_runs(ran), dumps:
            compiled(*args, **kwargs)
        explanation.breaks = _breaks()
        torch._dynamo.reset()
        return explanation

    return run


def report(compiled: Callable[..., Any]) -> Explanation:
    """What runs in a model that ``torch.compile(..., backend="stem")`` returned: sites, decisions, densities of the
    last call, recompilations. Nothing is run and nothing is compiled.

    Raises ValueError for anything else, and for a model that was not called yet.
    """
    model = running.known(_owner_of(compiled))
    if model is None:
        raise ValueError(
            f"{type(compiled).__name__}: nothing of it was compiled by backend 'stem'; give what torch.compile(...,"
            " backend='stem') returned, after a call"
        )
    return _running(model)


def last_report() -> Explanation:
    """``report`` of the model that ran last. Raises ValueError where none did."""
    model = running.latest()
    if model is None:
        raise ValueError("no model compiled with backend 'stem' has run")
    return _running(model)


def _running(model: running.Model) -> Explanation:
    ran = [graph for graph in model.graphs if graph.calls]
    notes = [f"graph {graph.frame}: {graph.calls} calls" for graph in ran] if len(ran) > 1 else []
    sites = [dataclasses.replace(site) for graph in ran for site in graph.of_layers()]
    return Explanation(len(model.graphs), sites, _breaks(), model.recompilations, notes)


def _breaks() -> list[str]:
    return [str(reason).strip().splitlines()[0] for reason in counters["graph_break"]]


def _owner_of(compiled: Any) -> object | None:
    """The object that ``torch.compile`` made beside what it returned."""
    context = getattr(compiled, "dynamo_ctx", None)
    cells = [getattr(context, "callback", None)] if context is not None else []
    for cell in getattr(compiled, "__closure__", None) or ():
        with contextlib.suppress(ValueError):
            cells.append(cell.cell_contents)
    return next((owner for cell_value in cells if (owner := running.owner_of(cell_value)) is not None), None)


@contextlib.contextmanager
def written_to(folder: Path) -> Iterator[None]:
    """Write the graph after each pass into ``folder``, as ``graph0_1_match.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers: dict[int, tuple[int, int]] = {}

    def write(step: str, module: torch.fx.GraphModule) -> None:
        number, done = numbers.get(id(module), (len(numbers), 0))
        numbers[id(module)] = number, done + 1
        (folder / f"graph{number}_{done}_{step}.txt").write_text(pipeline.readable(module))

    with pipeline.watch(write):
        yield


def _folded(sites: list[Site]) -> list[list[Site]]:
    """Sites that differ in the numbers of their names and in density alone, together."""
    groups: dict[Any, list[Site]] = {}
    for site in sites:
        key = (
            re.sub(r"\d+", "#", site.name),
            site.decision,
            re.sub(r"\d+", "#", site.detail),
            site.mask,
            site.kernel,
            site.q_shape,
        )
        groups.setdefault((*key, site.k_shape, site.v_shape), []).append(site)
    return list(groups.values())


def _name(group: list[Site]) -> str:
    """``layers.0-29.attn`` for thirty sites, each with its number; the name itself where only one number occurs."""
    parts = [re.split(r"(\d+)", site.name) for site in group]
    return "".join(
        column[0] if len(set(column)) == 1 else _ranges([int(n) for n in column])
        for column in (list(c) for c in zip(*parts, strict=True))
    ) + (f" ({len(group)} calls)" if len({site.name for site in group}) == 1 and len(group) > 1 else "")


def _ranges(numbers: list[int]) -> str:
    numbers = sorted(set(numbers))
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)


def _row(group: list[Site]) -> dict[str, str]:
    first = group[0].to_dict()
    row = {column: _cell(first[column]) for column in COLUMNS}
    row["name"] = _name(group)
    if row["decision"] == "rejected":
        row["decision"] = f"rejected: {first['reason']}"
    densities = [site.density for site in group if site.density is not None]
    shown = sorted({f"{d:.1%}" for d in (min(densities), max(densities))}) if densities else ["-"]
    row["density"] = " to ".join(shown)
    heads = [density for site in group for density in site.head_densities]
    if heads and f"{min(heads):.0%}" != f"{max(heads):.0%}":
        row["density"] += f" (heads {min(heads):.0%} to {max(heads):.0%})"
    return row


def _cell(item: Any) -> str:
    if item is None:
        return "-"
    return "x".join(map(str, item)) if isinstance(item, tuple | list) else str(item)


def _table(rows: list[dict[str, str]], width: int) -> list[str]:
    """Rows under their columns; a narrow place goes without some columns, a very narrow one has a line each."""
    if not rows:
        return []
    columns = list(COLUMNS)
    for dropped in (None, *DROPPED):
        columns = [c for c in columns if c != dropped]
        widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
        if sum(widths.values()) + 2 * (len(columns) - 1) <= width:
            lines = [{c: c for c in columns}, *rows]
            return ["  ".join(line[c].ljust(widths[c]) for c in columns).rstrip() for line in lines]
    return [f"{'' if c == 'name' else '  '}{c}: {row[c]}" for row in rows for c in COLUMNS if row[c] != "-"]


def _wrapped(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    return textwrap.wrap(line, width, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
