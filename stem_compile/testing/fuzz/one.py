"""One trial by its number: drawn from a seed, run as the script it is written as, and made smaller where it fails."""

from __future__ import annotations

import contextlib
import linecache
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stem_compile.testing.fuzz.judge import Outcome, judge
from stem_compile.testing.fuzz.program import Trial
from stem_compile.testing.fuzz.write import arguments, script


@dataclass(frozen=True)
class Failure:
    """A defect. number: of the trial under its campaign's seed. trial: the smallest found; script: its text."""

    number: int
    outcome: Outcome
    trial: Trial
    script: str


def drawn(seed: int, number: int, inner: str = "eager") -> Trial:
    """Trial ``number`` of a campaign with ``seed``."""
    kept: list[Trial] = []
    _given(seed, number, inner, kept.append)
    return kept[-1]


def run(trial: Trial, device: str = "cpu") -> Outcome:
    """The verdict on a trial's script. A script that fails by itself is "void"."""
    text = script(trial)
    name = f"stem_fuzz_{time.monotonic_ns()}"
    module = types.ModuleType(name)
    # Dynamo looks a module up by its name and its source up by its file.
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    sys.modules[name] = module
    try:
        exec(compile(text, name, "exec"), module.__dict__)
        with _rounding_kept(trial):
            return judge(module.Model, module.inputs, device=device, **arguments(trial))  # type: ignore[arg-type]
    finally:
        del sys.modules[name], linecache.cache[name]


def smaller(seed: int, number: int, inner: str, outcome: Outcome, device: str, seconds: float) -> tuple[Trial, Outcome]:
    """The smallest trial that Hypothesis finds in ``seconds`` with the same verdict as trial ``number``."""
    until = time.monotonic() + seconds
    best: list[tuple[Trial, Outcome]] = []
    known: dict[str, bool] = {}

    def fails(trial: Trial) -> None:
        key = repr(trial)
        if key not in known:
            # Out of time, nothing new is a failure; what was one stays one, as Hypothesis asks again.
            again = None if best and time.monotonic() > until else run(trial, device)
            known[key] = again is not None and again.verdict == outcome.verdict
            if again is not None and known[key]:
                best.append((trial, again))
        if known[key]:
            raise AssertionError(outcome.verdict)

    # What Hypothesis itself says of the failure is of no interest, nor is a trial that fails only now and then.
    with contextlib.suppress(Exception):
        _given(seed, number, inner, fails, shrink=True)
    return best[-1] if best else (drawn(seed, number, inner), outcome)


def _given(seed: int, number: int, inner: str, body: Callable[[Trial], Any], shrink: bool = False) -> None:
    """``body`` of the trial that Hypothesis draws; its smaller relatives too where it fails."""
    import hypothesis

    from stem_compile.testing.fuzz.draw import trials

    calls = 0

    def once(trial: Trial) -> None:
        # Hypothesis tries the plainest of all first.
        nonlocal calls
        calls += 1
        if calls > 1:
            body(trial)

    phases = [hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if shrink else [])]
    settings = hypothesis.settings(
        max_examples=2,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(hypothesis.HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    hypothesis.seed(1_000_003 * seed + number)(settings(hypothesis.given(trials(inner))(once)))()


def _rounding_kept(trial: Trial) -> Any:
    """Inductor rounds between half-precision operations as the module does, or positions would differ by its doing."""
    if trial.inner != "inductor":
        return contextlib.nullcontext()
    import torch._inductor.config

    return torch._inductor.config.patch(emulate_precision_casts=True)
