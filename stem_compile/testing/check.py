"""``check_model`` and ``check_case``: the properties on anyone's model."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stem_compile.config import StemConfig
from stem_compile.packages import need
from stem_compile.testing import properties as catalogue
from stem_compile.testing.case import Case
from stem_compile.testing.database import Database
from stem_compile.testing.report import CheckInterrupted, Report, Result
from stem_compile.testing.search import Progress, attempt, search
from stem_compile.testing.subject import Subject
from stem_compile.testing.violation import Measure

FEW, SECONDS = 2, 150.0
"""Examples of each property, and time in which all must end but each property's first, for large models."""

PROFILES = {"ci": 1, "thorough": 5}
"""Times the examples, and the time for large models, of a property's own."""


def check_model(
    model: torch.nn.Module,
    make_inputs: Any = None,
    *,
    options: Mapping[str, Any] | StemConfig | None = None,
    properties: Sequence[str] | None = None,
    max_examples: int | None = None,
    seconds: float | None = None,
    expected: int | None = None,
    text: torch.Tensor | None = None,
    bounds: Mapping[str, float] | None = None,
    seed: int = 0,
    as_deployed: bool = False,
    profile: str = "ci",
    database: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Check that ``torch.compile(model, backend="stem", options=options)`` computes what it should, with examples drawn
    by Hypothesis.

    make_inputs: a function (batch, length, seed) -> inputs, a Hypothesis strategy of inputs, or an example batch;
    inputs are a tensor, a tuple of arguments, a dict of keyword arguments, or a pair of both, in [batch, length, ...]
    order. None derives them from a transformers config or from forward's signature. options: of the backend; those not
    given are set small (``subject.SMALL``), so that short prompts are sparse. properties: names, None for all;
    max_examples: of each property, None for its own number (``FEW`` for large models). seconds: time for all that each
    property tries beyond its first example, and the report says where more were wanted; None is no limit (``SECONDS``
    for large models). expected: number of attentions that must be rewritten, None for all. text: token ids [1, N] for
    the fidelity report; bounds: the most of its measures, such as {"nll change": 0.05}. seed: same seed, same examples.
    as_deployed: the options as they are deployed, nothing set small, and ``inner`` and ``mode`` as well: few examples
    at the lengths where they matter. profile: a key of ``PROFILES``. database: folder in which failures are kept, to be
    tried first the next time. progress: told of every example.

    Raises OptionError for wrong options, NoInputs when inputs cannot be derived, ValueError for an unknown property or
    profile, MissingPackage, and on Ctrl-C CheckInterrupted with the report so far. Dynamo is reset before and after.
    """
    need("hypothesis")
    modules = [catalogue.get(name) for name in properties] if properties is not None else list(catalogue.every())
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; profiles: {', '.join(PROFILES)}")
    subject = Subject(model, make_inputs, options, expected, text, bounds, as_deployed)
    given: dict[str, Any] = {"make_inputs": make_inputs is not None, "text": text is not None, "expected": expected}
    given["bounds"] = bounds and dict(bounds)
    report = Report(_settings(subject, seed) | given | {"max_examples": max_examples, "profile": profile})
    more = PROFILES[profile]
    if subject.large:
        max_examples, seconds = max_examples or FEW * more, SECONDS * more if seconds is None else seconds
    begun = time.monotonic()
    torch._dynamo.reset()
    _run(subject, modules, report, max_examples, more, seconds, Database(database, report.settings), progress, seed)
    torch._dynamo.reset()
    report.settings["seconds"] = round(time.monotonic() - begun, 1)
    if report.stopped:
        raise CheckInterrupted(report)
    return report


def _run(
    subject: Subject,
    modules: Sequence[Any],
    report: Report,
    most: int | None,
    more: int,
    seconds: float | None,
    kept: Database,
    progress: Progress | None,
    seed: int,
) -> None:
    """Try one property after the other, and add their results to ``report``; after Ctrl-C the rest is only named."""
    begun = time.monotonic()
    for number, module in enumerate(modules):
        examples = _examples(module.EXAMPLES, most, more)
        if report.stopped:
            skipped = Result(module.NAME, module.TITLE, "stopped", wanted=examples, stopped=True)
            report.results.append(skipped)
            continue
        # What a property leaves of its share goes to the others.
        share = None if seconds is None else (begun + seconds - time.monotonic()) / (len(modules) - number)
        last = kept.last(module.NAME)
        result = search(subject, module, examples, seed, progress, seconds=share, first=last)
        if result.failure is not None or not result.stopped:  # an unfinished search disproves no earlier failure
            kept.keep(module.NAME, None if result.failure is None else result.failure.case)
        report.results.append(result)


def _examples(own: int, most: int | None, more: int) -> int:
    """Examples of a property. own: its own number; one that asks for one or two is expensive and never gets more. most:
    the user's number. more: factor of a profile."""
    if own <= 2:
        return own if most is None else min(own, most)
    return most or own * more


def check_case(
    model: torch.nn.Module,
    name: str,
    case: Case,
    *,
    make_inputs: Any = None,
    options: Mapping[str, Any] | StemConfig | None = None,
    expected: int | None = None,
    as_deployed: bool = False,
) -> Measure:
    """One property on one example, as a report prints it. Raises Violation when it does not hold."""
    subject = Subject(model, make_inputs, options, expected, as_deployed=as_deployed)
    return attempt(subject, catalogue.get(name), case)


def _settings(subject: Subject, seed: int) -> dict[str, Any]:
    config = getattr(subject.model, "config", None)
    name = getattr(config, "name_or_path", "") or ""
    return {
        "model": type(subject.model).__name__ + (f" ({name})" if name else ""),
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "dtype": str(subject.dtype).removeprefix("torch."),
        "device": str(subject.device),
        "options": subject.options,
        "inputs": subject.source.words,
        "seed": seed,
        "as_deployed": subject.as_deployed,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
