"""``stem_compile.explain(model, options)(*args, **kwargs)``: what was found, what was rewritten and what was refused,
and why.

It runs the model once through the backend, like ``torch._dynamo.explain``. Densities are those of the blocks really
selected in that run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from stem_compile.config import StemConfig
from stem_compile.passes.graph.sites import AttentionSite, Rejected
from stem_compile.passes.graph.values import module_path, value
from stem_compile.selection import observe


@dataclass
class Explanation:
    """One entry an attention, in execution order. ``print`` it for a table."""

    graphs: int = 0
    sites: list[dict[str, Any]] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """{"graphs": n, "sites": [{"name", "decision", "reason", "mask", "density", "kernel", "q_shape", "k_shape",
        "v_shape"}, ...]}."""
        return {"graphs": self.graphs, "sites": [dict(s) for s in self.sites]}

    def __str__(self) -> str:
        rewritten = sum(s["decision"] == "rewritten" for s in self.sites)
        head = f"{self.graphs} graph{'s' * (self.graphs != 1)}, {len(self.sites)} attentions, {rewritten} rewritten"
        columns = ("name", "decision", "mask", "density", "kernel", "q_shape", "k_shape")
        rows = [columns, *([_cell(s[c]) for c in columns] for s in self.sites)]
        widths = [max(len(str(r[i])) for r in rows) for i in range(len(columns))]
        lines = [head, *("  ".join(str(c).ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows)]
        lines += [f"{s['name']}: {w}" for s, w in zip(self.sites, self.words, strict=True) if w]
        return "\n".join(lines)

    __repr__ = __str__


def _cell(item: Any) -> str:
    if item is None:
        return "-"
    if isinstance(item, float):
        return f"{item:.1%}"
    return "x".join(map(str, item)) if isinstance(item, tuple | list) else str(item)


def explain(
    model: Callable[..., Any], options: Mapping[str, Any] | StemConfig | None = None
) -> Callable[..., Explanation]:
    """Function of the model's arguments that compiles and runs ``model`` once and tells what happened to every
    attention.

    Raises OptionError for wrong options. Nothing is left compiled: Dynamo is reset before and after.
    """
    config = StemConfig.from_options(options)

    def run(*args: Any, **kwargs: Any) -> Explanation:
        from stem_compile import backend

        explanation = Explanation()
        densities: list[float] = []

        def record(rewrite: Any) -> None:
            explanation.graphs += 1
            for hit in rewrite.found:
                explanation.sites.append(_entry(hit))
                explanation.words.append(hit.words if isinstance(hit, Rejected) else "")

        torch._dynamo.reset()
        compiled = torch.compile(
            model,
            backend=lambda module, inputs: backend.stem(
                module, inputs, options=dataclasses.replace(config, inner="eager")
            ),
        )
        with backend.listen(record), observe(lambda made: densities.append(made.density)):
            compiled(*args, **kwargs)
        torch._dynamo.reset()
        rewritten = [s for s in explanation.sites if s["decision"] == "rewritten"]
        if len(rewritten) == len(densities):
            for site, density in zip(rewritten, densities, strict=True):
                site["density"] = density
        return explanation

    return run


def _entry(hit: AttentionSite | Rejected) -> dict[str, Any]:
    if isinstance(hit, Rejected):
        return _dict(module_path(hit.node), "rejected", hit.reason.name.lower(), None, None, (None, None, None))
    shapes = tuple(tuple(map(_size, value(n).shape)) for n in (hit.q, hit.k, hit.v))
    return _dict(module_path(hit.node), "rewritten", None, hit.words, hit.kernel or "reference", shapes)


def _size(size: Any) -> Any:
    return size if isinstance(size, int) else str(size)


def _dict(
    name: str, decision: str, reason: str | None, mask: str | None, kernel: str | None, shapes: tuple[Any, ...]
) -> dict[str, Any]:
    q, k, v = shapes
    return {
        "name": name,
        "decision": decision,
        "reason": reason,
        "mask": mask,
        "density": None,
        "kernel": kernel,
        "q_shape": q,
        "k_shape": k,
        "v_shape": v,
    }
