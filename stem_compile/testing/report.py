"""Report: what was checked, how often, how close, and a verdict that a stranger understands."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stem_compile.testing.case import Case
from stem_compile.testing.html import page
from stem_compile.testing.numerics import Gap
from stem_compile.testing.subject import brief, changed
from stem_compile.testing.violation import Violation

PROOFS = ("dense-equivalence", "kernel-exactness")
"""Properties that compare outputs with the model's own: where neither says anything, the others prove nothing."""

MARKS = {"pass": "ok", "fail": "FAIL", "not applicable": "-", "stopped": "stopped"}


@dataclass
class Failure:
    """message: what differs, where, by how much. case: the smallest example found, None where examples fail together.

    needed: examples tried until one failed.
    """

    message: str
    case: Case | None
    needed: int
    gap: Gap | None = None


@dataclass
class Result:
    """One property. worst: largest error relative to its tolerance. facts: means over the examples. verdict: a key of
    ``MARKS``.

    note: what else its facts need to be understood. wanted: examples that would have been tried with more time; 0 where
    time did not run out. stopped: Ctrl-C came before all of them; a failure that was known by then is a failure.
    """

    name: str
    title: str
    verdict: str = "pass"
    examples: int = 0
    wanted: int = 0
    worst: float = 0.0
    facts: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    note: str = ""
    seconds: float = 0.0
    failure: Failure | None = None
    stopped: bool = False

    @property
    def tried(self) -> str:
        """How many examples were tried, and of how many when time ran out."""
        return f"{self.examples} of {self.wanted}" if self.wanted else str(self.examples)

    @property
    def remark(self) -> str:
        """What else a reader wants to know, in a line."""
        if self.failure is not None:
            return self.failure.message.splitlines()[0]
        return (
            self.reason
            if self.verdict == "not applicable"
            else ", ".join([*(f"{k} {v:.3g}" for k, v in self.facts.items()), *filter(None, [self.note])])
        )


@dataclass
class Report:
    """Results of ``check_model``. ``print`` it; ``passed`` says it in a word; ``raise_for_failures()`` makes a test of
    it.

    settings: model, dtype, device, options, seed, versions. model, imports: the expression that gives the
    model in snippets, and what it needs.
    """

    settings: dict[str, Any]
    results: list[Result] = field(default_factory=list)
    model: str = "model"
    imports: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[Result]:
        """Results of the properties that do not hold."""
        return [r for r in self.results if r.verdict == "fail"]

    @property
    def passed(self) -> bool:
        """Whether every property that applies holds, and at least one does: one of ``PROOFS``, if any was asked for."""
        held = any(r.verdict == "pass" for r in self.results)
        return held and not self.failures and not self.unproven and not self.stopped

    @property
    def stopped(self) -> list[Result]:
        """Results of the properties that Ctrl-C left unfinished."""
        return [r for r in self.results if r.stopped]

    @property
    def unproven(self) -> str:
        """Why no output was compared, though it was asked for; empty when one was."""
        asked = [r for r in self.results if r.name in PROOFS]
        return "" if any(r.verdict != "not applicable" for r in asked) else next((r.reason for r in asked), "")

    @property
    def verdict(self) -> str:
        """One sentence."""
        held = [r for r in self.results if r.verdict == "pass"]
        skipped = [r for r in self.results if r.verdict == "not applicable"]
        short = [r for r in self.results if r.wanted and not r.stopped]
        rest = (f"; {len(skipped)} not applicable" if skipped else "") + (
            f"; {len(short)} cut short by the time limit" if short else ""
        )
        rest += f"; stopped by Ctrl-C, {len(self.stopped)} not finished" if self.stopped else ""
        if self.failures:
            names = ", ".join(r.name for r in self.failures)
            others = _counted(len(held), "other property holds", "other properties hold")
            return f"FAIL: {names}. Do not use backend='stem' with this model until this is understood. {others}{rest}."
        if self.stopped:
            holding = _counted(len(held), "property holds", "properties hold")
            return f"STOPPED: {holding} over {_counted(sum(r.examples for r in held), 'example', 'examples')}{rest}."
        if not held:
            return f"NOTHING CHECKED: no property applies{rest}."
        if self.unproven:
            others = _counted(len(held), "other property holds", "other properties hold")
            return f"NOT PROVEN: neither {' nor '.join(PROOFS)} applies ({self.unproven}). {others}{rest}."
        examples = _counted(sum(r.examples for r in held), "example", "examples")
        return f"PASS: {_counted(len(held), 'property holds', 'properties hold')} over {examples}{rest}."

    def snippet(self, result: Result) -> str:
        """Python that runs the failing example alone; all of them where they fail together or cannot be written out."""
        assert result.failure is not None
        given = {k: v for k in ("expected", "bounds", "max_examples") if (v := self.settings.get(k)) is not None}
        factory = "make_inputs" if self.settings.get("make_inputs") else ""
        deployed = self.settings.get("as_deployed")
        options = f"options={(changed if deployed else brief)(self.settings['options'])!r}"
        needs = "".join(f"{line}\n" for line in self.imports)
        case = result.failure.case
        if case is None or case.given is not None or "bounds" in given:
            words = [
                self.model,
                factory,
                options,
                f"properties={[result.name]!r}",
                *(f"{k}={v!r}" for k, v in given.items()),
            ]
            words += ["as_deployed=True"] if deployed else []
            words += ["text=text" if self.settings.get("text") else "", f"seed={self.settings['seed']}"]
            return (
                f"{needs}from stem_compile.testing import"
                f" check_model\n\ncheck_model({', '.join(filter(None, words))}).raise_for_failures()"
            )
        words = [
            options,
            factory and f"make_inputs={factory}",
            f"expected={given['expected']}" if "expected" in given else "",
            "as_deployed=True" if deployed else "",
        ]
        last = ", ".join(filter(None, words))
        head = f"{needs}from stem_compile.testing import Case, check_case\n\n"
        return f"{head}check_case(\n    {self.model},\n    {result.name!r},\n    {case!r},\n    {last},\n)"

    def __str__(self) -> str:
        columns = ("property", "", "examples", "of tolerance", "what it says")
        rows = [
            columns,
            *((r.name, MARKS[r.verdict], r.tried, f"{r.worst:.2f}" if r.worst else "-", r.title) for r in self.results),
        ]
        widths = [max(len(r[i]) for r in rows) for i in range(len(columns))]
        lines = [
            self.headline,
            self.conditions,
            "",
            *("  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows),
            "",
        ]
        lines += [f"{r.name}: {r.remark}" for r in self.results if r.remark and r.verdict != "fail"]
        return "\n".join([*lines, *self.failure_lines(), "", self.verdict])

    __repr__ = __str__

    @property
    def conditions(self) -> str:
        """Under what the check ran, for a reader who deploys something else."""
        options = self.settings["options"]
        if self.settings.get("as_deployed"):
            return f"As deployed: blocks of {options['block_size']} and inner={options['inner']!r}, few examples."
        return (
            f"Small blocks ({options['block_size']}) and inner={options['inner']!r}, so that short prompts are sparse"
            " and quick; --as-deployed (as_deployed=True) checks your own block sizes, lengths and inner backend."
        )

    @property
    def headline(self) -> str:
        """What was checked."""
        options = ", ".join(f"{k}={v}" for k, v in self._options.items())
        return (
            f"{self.settings['model']}, {self.settings['dtype']} on {self.settings['device']}, {options}, seed"
            f" {self.settings['seed']}"
        )

    @property
    def _options(self) -> dict[str, Any]:
        """The options that say something: as deployed, those that are not the defaults."""
        options: dict[str, Any] = self.settings["options"]
        return changed(options) if self.settings.get("as_deployed") else options

    def failure_lines(self) -> list[str]:
        """What failed, with a snippet each."""
        lines: list[str] = []
        for result in self.failures:
            assert result.failure is not None
            lines += [
                "",
                f"{result.name} does not hold ({result.title}):",
                f"  {result.failure.message}",
                f"  found at example {result.failure.needed}",
            ]
            lines += [
                "  reproduce the smallest one found:",
                "",
                *(f"    {line}".rstrip() for line in self.snippet(result).splitlines()),
            ]
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        results = []
        for r in self.results:
            plain = asdict(r) | {"tried": r.tried, "remark": r.remark}
            if r.failure is not None:
                plain["failure"] |= {
                    "case": repr(r.failure.case),
                    "snippet": self.snippet(r),
                    "gap": asdict(r.failure.gap) if r.failure.gap else None,
                }
            results.append(plain)
        return {
            "headline": self.headline,
            "conditions": self.conditions,
            "verdict": self.verdict,
            "passed": self.passed,
            "settings": self.settings,
            "results": results,
        }

    def write(self, path: str | Path) -> None:
        """As JSON, or as a page of HTML for a path that ends in .html."""
        path = Path(path)
        path.write_text(
            page(self.to_dict()) if path.suffix == ".html" else json.dumps(self.to_dict(), indent=2, default=str) + "\n"
        )

    def raise_for_failures(self) -> None:
        """Violation with the whole report when a property failed or none applies."""
        if not self.passed:
            raise Violation(f"\n{self}")


class CheckInterrupted(KeyboardInterrupt):
    """Ctrl-C while a model was checked. report: what was checked until then, and what was not finished."""

    def __init__(self, report: Report) -> None:
        super().__init__(report.verdict)
        self.report = report


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
