"""Thousands of trials over several processes, within a limit of time, whatever happens to any of them.

Every trial has a number, and its seed and number alone say what it is. Workers are given numbers one by one, each over
a pipe of its own, so one that dies or hangs costs the trial it was given and is replaced.
"""

from __future__ import annotations

import collections
import datetime
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stem_compile.testing.fuzz.judge import BAD

DEFECTS = (*BAD, "crashed", "hung")
SHOWN = 20
"""Failures that the table names."""

INDUCTOR_EVERY = 50
"""One trial in so many has Inductor inside where "mixed" is asked for: its compilation takes seconds."""
SHRINK_SECONDS, SHRINKS = 45.0, 4
"""Time for making one failure smaller, and how many of a verdict a worker makes smaller."""
HANG_SECONDS = 240.0
"""A trial that takes longer is ended and counted as "hung"."""
START_SECONDS = 240.0
"""Time for a worker to import what it needs."""
RESET_EVERY = 40
"""Trials after which a worker has Dynamo forget what it compiled."""


@dataclass(frozen=True)
class Plan:
    """What to run. programs: how many trials, None for as many as fit; seconds: time for all. inner: "eager",
    "inductor" or "mixed" (a share under Inductor). out: folder for the scripts of failures."""

    seed: int = 0
    programs: int | None = None
    seconds: float | None = None
    device: str = "cpu"
    inner: str = "mixed"
    jobs: int = 1
    out: str = "out/fuzz"
    first: int = 0

    def inner_of(self, number: int) -> str:
        """Inner backend of trial ``number``."""
        if self.inner != "mixed":
            return self.inner
        return "inductor" if number % INDUCTOR_EVERY == INDUCTOR_EVERY - 1 else "eager"


@dataclass
class Tally:
    """Counts of a campaign. verdicts: of trials; decisions: of attentions; failures: number, verdict, detail, file."""

    verdicts: collections.Counter[str] = field(default_factory=collections.Counter)
    decisions: collections.Counter[str] = field(default_factory=collections.Counter)
    inner: collections.Counter[str] = field(default_factory=collections.Counter)
    voids: collections.Counter[str] = field(default_factory=collections.Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    worst: float = 0.0

    @property
    def programs(self) -> int:
        """Programs tried."""
        return sum(self.verdicts.values())

    @property
    def bad(self) -> int:
        """Trials that show a defect."""
        return sum(self.verdicts[v] for v in DEFECTS)

    @property
    def share(self) -> float:
        """Part of the attentions that were rewritten, of those in programs that say something."""
        return self.decisions["rewritten"] / max(sum(self.decisions.values()), 1)

    def add(self, message: dict[str, Any]) -> None:
        """Count one trial."""
        self.verdicts[message["verdict"]] += 1
        self.inner[message["inner"]] += 1
        if message["verdict"] == "void":
            self.voids[message["detail"][:160]] += 1
            return
        self.decisions.update(message["decisions"])
        self.worst = max(self.worst, message["ratio"] if message["verdict"] not in BAD else 0.0)
        if message["verdict"] in DEFECTS:
            self.failures.append({k: message[k] for k in ("number", "verdict", "detail", "file", "inner")})

    def to_dict(self, plan: Plan, settings: dict[str, Any]) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "settings": settings | {"seed": plan.seed, "device": plan.device, "inner": plan.inner, "jobs": plan.jobs},
            "programs": self.programs,
            "seconds": round(self.seconds, 1),
            "verdicts": dict(self.verdicts.most_common()),
            "attentions": dict(self.decisions.most_common()),
            "inner": dict(self.inner),
            "rewritten share": round(self.share, 4),
            "worst error of its tolerance": round(self.worst, 3),
            "bad": self.bad,
            "failures": self.failures,
            "void": dict(self.voids.most_common(20)),
        }


def campaign(
    plan: Plan, tell: Callable[[Tally], None] = lambda tally: None, trial: Callable[..., dict[str, Any]] | None = None
) -> Tally:
    """Run ``plan``. tell: called with the counts so far, a few times a second. Ctrl-C keeps what was counted. trial:
    what a worker does with a number, a function of a module (its own: draw the program and judge it)."""
    tally, begun = Tally(), time.monotonic()
    Path(plan.out).mkdir(parents=True, exist_ok=True)
    last = None if plan.programs is None else plan.first + plan.programs
    deadline = None if plan.seconds is None else time.time() + plan.seconds
    numbers = iter(range(plan.first, 1 << 62) if last is None else range(plan.first, last))

    def following() -> int | None:
        return None if deadline is not None and time.time() > deadline else next(numbers, None)

    def started() -> _Worker:
        return _Worker(plan, deadline, trial or _tried)

    workers = [started() for _ in range(plan.jobs)]
    try:
        while workers:
            multiprocessing.connection.wait([w.pipe for w in workers], timeout=0.2)
            for worker in workers:
                worker.listen(tally, following)
            tally.seconds = time.monotonic() - begun
            tell(tally)
            late = deadline is not None and time.time() > deadline + SHRINK_SECONDS
            workers = [w for old in workers for w in _kept(old, tally, started, late)]
    except KeyboardInterrupt:
        pass
    finally:
        for worker in workers:
            worker.end()
    tally.seconds = time.monotonic() - begun
    tally.failures.sort(key=lambda f: int(f["number"]))
    return tally


class _Worker:
    """One process and a pipe of its own to it, so that what another does, or how it dies, touches neither. at: the
    number given to it that it has not answered; began: it once asked for one; gone: it will say no more."""

    def __init__(self, plan: Plan, deadline: float | None, trial: Callable[..., dict[str, Any]]) -> None:
        context = multiprocessing.get_context("spawn")
        self.plan, self.since, self.began, self.gone = plan, time.monotonic(), False, False
        self.at: int | None = None
        self.pipe, far = context.Pipe()
        self.process = context.Process(target=_work, args=(plan, deadline, far, trial), daemon=True)
        self.process.start()
        far.close()

    def listen(self, tally: Tally, following: Callable[[], int | None]) -> None:
        """Count what it has said by now, and give it the next number (None: it ends) where it waits for one."""
        try:
            while not self.gone and self.pipe.poll():
                message = self.pipe.recv()
                if message is not None:
                    tally.add(message)
                self.at = None
                self.at, self.since, self.began = following(), time.monotonic(), True
                self.pipe.send(self.at)
        except (EOFError, OSError):
            self.gone = True

    def end(self) -> None:
        """Stop it, whatever it does."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join(5)
        self.pipe.close()


def _kept(worker: _Worker, tally: Tally, started: Callable[[], _Worker], late: bool) -> list[_Worker]:
    """The worker, the one that replaces it, or none where it is done."""
    limit = HANG_SECONDS + SHRINK_SECONDS if worker.began else START_SECONDS
    hung = time.monotonic() - worker.since > limit and not worker.pipe.poll()
    if not worker.gone and not hung and not late:
        return [worker]
    if worker.gone:
        # Its exit status comes a moment after its pipe has closed.
        worker.process.join(5)
    worker.end()
    if late or (worker.gone and worker.process.exitcode == 0):
        return []
    verdict = "crashed" if worker.gone else "hung"
    detail = f"exit status {worker.process.exitcode}" if worker.gone else f"no verdict within {HANG_SECONDS:.0f} s"
    if worker.at is not None:
        tally.add(_message(worker.plan, worker.at, verdict, detail, _saved(worker.plan, worker.at, detail)))
    elif not worker.began:
        # It died before its first trial: another would, too.
        tally.failures.append({"number": -1, "verdict": verdict, "detail": detail, "file": "", "inner": ""})
        tally.verdicts[verdict] += 1
        return []
    return [started()]


def _message(plan: Plan, number: int, verdict: str, detail: str, file: str = "", **more: Any) -> dict[str, Any]:
    given = {"number": number, "verdict": verdict, "detail": detail, "file": file, "inner": plan.inner_of(number)}
    return given | {"decisions": (), "ratio": 0.0} | more


def _saved(plan: Plan, number: int, detail: str, trial: Any = None) -> str:
    """The script of a trial as a file."""
    from stem_compile.testing.fuzz.one import drawn
    from stem_compile.testing.fuzz.write import script

    trial = drawn(plan.seed, number, plan.inner_of(number)) if trial is None else trial
    path = Path(plan.out) / f"seed{plan.seed}-{number}.py"
    title = f"Trial {number} of seed {plan.seed}, made smaller:\n{trial!r}\n\n{detail}\n"
    path.write_text(script(trial, title.replace("\\", "/").replace('"""', "'''")))
    return str(path)


def _work(plan: Plan, deadline: float | None, pipe: Any, trial: Callable[..., dict[str, Any]]) -> None:
    """A worker: trials of the numbers it is given, until it is given none."""
    import logging
    import warnings

    import torch

    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    shrunk = collections.Counter[str]()
    message = None
    for done in itertools.count(1):
        pipe.send(message)
        number = pipe.recv()
        if number is None:
            return
        message = trial(plan, number, deadline, shrunk)
        if "CUDA error" in message["detail"]:
            # Nothing runs in this process any more: another takes over, and this trial counts as a crash.
            os._exit(1)
        if done % RESET_EVERY == 0:
            torch._dynamo.reset()


def _tried(plan: Plan, number: int, deadline: float | None, shrunk: collections.Counter[str]) -> dict[str, Any]:
    from stem_compile.testing.fuzz.one import drawn, run, smaller

    inner = plan.inner_of(number)
    trial = drawn(plan.seed, number, inner)
    try:
        outcome = run(trial, plan.device)
    except Exception as error:
        return _message(plan, number, "void", f"the script itself: {type(error).__name__}: {error}")
    file = ""
    if outcome.bad:
        kind = f"{outcome.verdict} {outcome.detail[:40]}"
        if shrunk[outcome.verdict] < SHRINKS and not shrunk[kind]:
            shrunk.update((outcome.verdict, kind))
            left = SHRINK_SECONDS if deadline is None else max(min(SHRINK_SECONDS, deadline - time.time()), 0.0)
            trial, outcome = smaller(plan.seed, number, inner, outcome, plan.device, left)
        file = _saved(plan, number, outcome.detail, trial)
    return _message(
        plan, number, outcome.verdict, outcome.detail, file, decisions=outcome.decisions, ratio=outcome.ratio
    )


def write(tally: Tally, plan: Plan, path: Path, facts: Mapping[str, Any]) -> None:
    """The campaign as JSON. facts: versions and machine; the date is added."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    path.write_text(json.dumps(tally.to_dict(plan, {"date": date, **facts}), indent=2) + "\n")


def table(tally: Tally, plan: Plan, machine: str) -> str:
    """A short table for people."""
    rows = [
        ("programs", f"{tally.programs} in {tally.seconds:.0f} s, seed {plan.seed}"),
        ("inner", ", ".join(f"{name} {count}" for name, count in tally.inner.most_common())),
        *((name, str(tally.verdicts[name])) for name in ("rewritten", "refused", "void")),
        *((name, str(tally.verdicts[name])) for name in DEFECTS),
        ("attentions", f"{sum(tally.decisions.values())}, {tally.share:.1%} rewritten"),
        *((f"  {name}", str(count)) for name, count in tally.decisions.most_common()),
        ("worst error", f"{tally.worst:.2f} of its tolerance"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"stem-compile fuzz, {machine}", *(f"{name.ljust(width)}  {value}" for name, value in rows)]
    for failure in tally.failures[:SHOWN]:
        lines.append(f"{failure['verdict']} (trial {failure['number']}): {failure['detail'][:120]}")
        lines.append(f"  python {failure['file']}")
    if len(tally.failures) > SHOWN:
        lines.append(f"... and {len(tally.failures) - SHOWN} more")
    lines.append("PASS" if not tally.bad else f"FAIL: {tally.bad} of {tally.programs} programs")
    return "\n".join(lines)
