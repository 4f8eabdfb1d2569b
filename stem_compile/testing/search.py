"""Try a property on examples that Hypothesis draws, and shrink one that fails: deterministic for a seed, and bounded in
time."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

from stem_compile.reasons import KernelWarning
from stem_compile.testing.case import Case
from stem_compile.testing.numerics import Undefined
from stem_compile.testing.report import Failure, Result
from stem_compile.testing.subject import Subject
from stem_compile.testing.violation import Inapplicable, Measure, Violation, named

SHRINKS, SHRINK_SECONDS = 60, 60.0
"""Examples and time spent on making a failing example smaller."""

Progress = Callable[[str, int, int], None]
"""(property, examples tried, examples wanted)."""


def attempt(subject: Subject, module: ModuleType, case: Case) -> Measure:
    """``module.check``, where a crash of the compiled model is a violation and one of the model itself says nothing."""
    try:
        # A kernel that fails is a fault, though dense attention would answer in its place.
        with warnings.catch_warnings():
            warnings.simplefilter("error", KernelWarning)
            return module.check(subject, case)  # type: ignore[no-any-return]
    except (Violation, Inapplicable):
        raise
    except Undefined as error:
        raise Inapplicable(f"the model's own output in fp64 is NaN at {named(error.where)}") from error
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        try:
            subject.run_eager(subject.inputs(case))
        except Exception:
            raise Inapplicable(f"the model itself raises {type(error).__name__}: {first}") from error
        try:
            subject.golden(case)
        except Exception:
            raise Inapplicable(
                f"the model does not run in fp64, which others are compared with: {type(error).__name__}: {first}"
            ) from error
        raise Violation(f"raises {type(error).__name__}: {first}") from error


class _Search:
    """The state of one search: what was tried, what was learnt."""

    def __init__(
        self, subject: Subject, module: ModuleType, progress: Callable[[int], None], seconds: float | None
    ) -> None:
        self.subject, self.module, self.progress = subject, module, progress
        self.until = time.monotonic() + (float("inf") if seconds is None else seconds)
        self.shrinking = SHRINK_SECONDS if seconds is None else min(SHRINK_SECONDS, max(seconds, 1.0))
        self.skipped, self.slowest = False, 0.0
        self.measures: list[Measure] = []
        self.reason, self.tried, self.needed, self.shrinks = "", 0, 0, 0
        self.failure: tuple[Case, Violation] | None = None
        self.failed_at = 0.0
        self._known: dict[str, Violation | None] = {}

    def __call__(self, case: Case) -> None:
        key = repr(case)
        if case.given is None and key in self._known:
            self._verdict(case, self._known[key])
            return
        if self.failure is not None:
            self.shrinks += 1
            if self.shrinks > SHRINKS or time.monotonic() - self.failed_at > self.shrinking:
                return
        elif self.tried and time.monotonic() + self.slowest > self.until:
            self.skipped = True
            return
        begun = time.monotonic()
        try:
            measure, violation = attempt(self.subject, self.module, case), None
        except Inapplicable as error:
            self.reason = str(error)
            measure, violation = None, None
        except Violation as error:
            measure, violation = None, error
        if self.failure is None:
            self.tried += 1
            self.slowest = max(self.slowest, time.monotonic() - begun)
            self.progress(self.tried)
            if measure is not None:
                self.measures.append(measure)
        self._known[key] = violation
        self._verdict(case, violation)

    def _verdict(self, case: Case, violation: Violation | None) -> None:
        if violation is None:
            return
        if self.failure is None:
            self.needed, self.failed_at = self.tried, time.monotonic()
        self.failure = case, violation
        # A traceback of its own for every raise: Hypothesis tells failures apart by where they come from.
        raise Violation(violation.message, violation.gap)


def search(
    subject: Subject,
    module: ModuleType,
    examples: int,
    seed: int,
    progress: Progress | None = None,
    shrink: bool = True,
    seconds: float | None = None,
    first: Case | None = None,
) -> Result:
    """The result of one property on ``examples`` examples. shrink: whether to look for a smaller one that fails.
    seconds: no further example that would end after these. first: the example to try before all others; where it fails,
    it is the answer."""
    import hypothesis

    begun = time.monotonic()
    result = Result(module.NAME, module.TITLE)
    state = _Search(subject, module, lambda done: progress(module.NAME, done, examples) if progress else None, seconds)
    try:
        strategy = module.cases(subject)
    except Inapplicable as error:
        result.verdict, result.reason = "not applicable", str(error)
        return result
    settings = hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if shrink else [])],
        report_multiple_bugs=False,
        print_blob=False,
    )
    violation: Violation | None = None
    try:
        if first is not None:
            state(first)
        hypothesis.seed(seed)(settings(hypothesis.given(strategy)(_function(state))))()
        if hasattr(module, "finish") and state.measures:
            module.finish(subject, state.measures)
    except Violation as error:
        violation = error
    except KeyboardInterrupt:
        # Making a failing example smaller takes the longest: who stops that keeps the one that failed.
        result.stopped = True
        violation = state.failure[1] if state.failure is not None else None
    result.wanted = examples if state.skipped or result.stopped else 0
    result.examples, result.seconds = state.tried, time.monotonic() - begun
    result.worst = max((m.worst for m in state.measures), default=0.0)
    result.facts = _averages(state.measures)
    result.note = module.note(subject) if hasattr(module, "note") else ""
    if violation is not None:
        case = state.failure[0] if state.failure is not None else None
        result.verdict = "fail"
        result.failure = Failure(violation.message, case, state.needed or state.tried, violation.gap)
    elif result.stopped:
        result.verdict = "stopped"
    elif not state.measures:
        result.verdict, result.reason = "not applicable", state.reason
    return result


def _function(state: _Search) -> Callable[[Any], None]:
    def holds(case: Case) -> None:
        state(case)

    return holds


def _averages(measures: list[Measure]) -> dict[str, float]:
    names = [n for n, v in (measures[0].facts if measures else {}).items() if isinstance(v, int | float)]
    return {
        n: sum(m.facts[n] for m in measures if n in m.facts) / len([m for m in measures if n in m.facts]) for n in names
    }
