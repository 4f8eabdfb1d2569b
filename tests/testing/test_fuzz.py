"""The fuzzer: trials are what their number says, scripts run, defects of every kind are seen, campaigns survive
them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from stem_compile.passes import pipeline
from stem_compile.testing.fuzz import Attention, Program, Trial, judge, script
from stem_compile.testing.fuzz import campaign as campaigns
from stem_compile.testing.fuzz.campaign import Plan, Tally, campaign
from stem_compile.testing.fuzz.one import drawn, run, smaller
from tests.testing.faults import FAULTS

SIMPLE = Trial(length=130)
GROUPED = Program((Attention("matmul", terms=("padding",)),), heads=4, key_heads=2, value_heads=2)


def test_a_number_says_what_a_trial_is() -> None:
    trials = [drawn(3, number) for number in range(12)]
    assert trials == [drawn(3, number) for number in range(12)]
    assert len(set(trials)) > 8


@pytest.mark.parametrize("number", range(12))
def test_a_trial_prints_itself(number: int) -> None:
    trial = drawn(4, number)
    assert eval(repr(trial)) == trial
    assert script(eval(repr(trial))) == script(trial)
    # A page.
    assert len(script(trial).splitlines()) < 60 + 40 * len(trial.program.attentions)


@pytest.mark.parametrize("relation", ["dense", "selection", "batch", "heads", "groups", "hidden", "shift"])
def test_a_right_program_holds(relation: str) -> None:
    program = Program((Attention("matmul", terms=("window",), width=70),), heads=4, key_heads=2, value_heads=2)
    outcome = run(Trial(program, relation=relation, length=300))
    assert outcome.verdict == "rewritten", outcome
    assert outcome.decisions == ("rewritten",)


def _one(*words: Any, **changes: Any) -> Program:
    return Program((Attention(*words, **changes),))


REGRESSIONS = {
    "where as a method": Trial(_one(terms=("row flags by where",))),
    "a dynamic length halved": Trial(_one(terms=("half",)), dynamic=True),
    "part of a length as a whole number": Trial(_one("matmul", terms=("part",)), length=193, again=100),
    "root of a length as a whole number": Trial(_one("matmul", terms=("root",)), length=127, again=63),
    "fractional positions in a bias": Trial(_one("sdpa with a bias", causal="fractions"), length=100),
    "a chunk that cuts a block of queries": Trial(Program(cache="prefix", past=7), relation="chunks", length=230),
    "an exclusive or": Trial(_one(causal="xor", join="xor", terms=("window",))),
    "a finite bias on padding": Trial(_one("nn.MultiheadAttention", mask_in_float=True, fill="not equal")),
    "unequal key and value heads": Trial(Program(heads=4, key_heads=1, value_heads=4)),
    "a decay that is multiplied": Trial(_one("matmul", scores=("decay multiplied",)), length=257),
    "a cap over a decay": Trial(_one("matmul", scores=("decay multiplied", "softcap")), length=130),
    "positions in bf16": Trial(_one(terms=("window in bf16",), width=70), length=300),
    "a static cache written in place": Trial(Program(cache="static in place", past=33)),
    "squares of a distance": Trial(_one("matmul", scores=("gaussian",)), relation="selection", length=230),
    "hidden contents of a static cache": Trial(Program(cache="static", past=33), relation="hidden", length=300),
}
"""What the fuzzer, or people, once found, as small as it became."""


@pytest.mark.parametrize("name", REGRESSIONS)
def test_what_was_found_once_stays_away(name: str) -> None:
    outcome = run(REGRESSIONS[name])
    assert outcome.verdict in ("rewritten", "refused"), outcome


def test_chunks_of_whole_blocks_hold() -> None:
    assert run(Trial(Program(cache="prefix", past=128), relation="chunks", length=257)).verdict == "rewritten"


def test_a_script_is_a_program_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "trial.py"
    path.write_text(script(SIMPLE))
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("rewritten: rewritten")


@pytest.mark.parametrize(
    ("fault", "trial"),
    [
        ("scale forgotten", SIMPLE),
        ("grouped queries: head map shifted by one", Trial(GROUPED, length=130)),
        ("mask recovery loses the padding conjunct", Trial(GROUPED, length=130)),
        ("the last selected block is dropped", Trial(Program(), relation="selection", length=300)),
    ],
)
def test_a_wrong_result_is_seen(fault: str, trial: Trial) -> None:
    planted = next(f for f in FAULTS if f.name == fault)
    with planted.planted():
        outcome = run(trial)
    assert outcome.verdict == "wrong", outcome
    assert "times the tolerance" in outcome.detail


def test_a_failure_of_a_pass_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(pipeline, "insert_selection", crash)
    outcome = run(SIMPLE)
    assert outcome.verdict == "internal", outcome
    assert "planted" in outcome.detail


def test_a_failure_at_run_time_is_seen() -> None:
    planted = next(f for f in FAULTS if f.name == "a length one beyond a block fails")
    with planted.planted():
        outcome = run(Trial(length=129))
    assert outcome.verdict == "raised", outcome
    assert "planted" in outcome.detail


def test_a_script_that_fails_by_itself_says_nothing() -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Any, selected: Any = None, shown: Any = None) -> Any:
            raise RuntimeError("its own")

    assert judge(Model, lambda n: {"q": torch.ones(1)}).verdict == "void"


def test_a_failure_becomes_smaller() -> None:
    planted = next(f for f in FAULTS if f.name == "scale applied twice")
    with planted.planted():
        number = next(n for n in range(60) if run(drawn(0, n)).verdict == "wrong")
        first = run(drawn(0, number))
        trial, outcome = smaller(0, number, "eager", first, "cpu", seconds=20)
    assert outcome.verdict == "wrong"
    assert len(repr(trial)) <= len(repr(drawn(0, number)))


def test_a_campaign_counts(tmp_path: Path) -> None:
    plan = Plan(seed=1, programs=3, inner="eager", out=str(tmp_path))
    tally = campaign(plan)
    assert tally.programs == 3
    assert not tally.verdicts["crashed"]
    again = campaign(Plan(seed=1, programs=1, first=1, inner="eager", out=str(tmp_path)))
    assert again.programs == 1


def _dies_in_its_third(plan: Plan, number: int, *_: Any) -> dict[str, Any]:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"number": number, "verdict": "void", "detail": "not tried", "file": "", "inner": plan.inner}


def _hangs_in_its_third(plan: Plan, number: int, *_: Any) -> dict[str, Any]:
    if number == 2:
        time.sleep(3600)
    return _dies_in_its_third(plan, number)


@pytest.mark.parametrize(("trial", "verdict"), [(_dies_in_its_third, "crashed"), (_hangs_in_its_third, "hung")])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_process_that_dies_or_hangs_costs_one_program(
    trial: Any, verdict: str, jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(campaigns, "HANG_SECONDS", 5.0)
    monkeypatch.setattr(campaigns, "SHRINK_SECONDS", 0.0)
    tally = campaign(Plan(seed=1, programs=5, inner="eager", jobs=jobs, out=str(tmp_path)), trial=trial)
    assert tally.verdicts == {verdict: 1, "void": 4}
    (failure,) = tally.failures
    assert failure["number"] == 2
    assert Path(failure["file"]).exists()


def test_no_program_is_lost_whenever_a_process_is_killed(tmp_path: Path) -> None:
    """At that moment it is within a program, before one or after its last: each program is counted once."""
    killed: list[int] = []

    def kill(tally: Tally) -> None:
        if tally.programs and not killed:
            child = multiprocessing.active_children()[0]
            killed.append(child.pid or 0)
            child.kill()

    tally = campaign(Plan(seed=1, programs=4, inner="eager", out=str(tmp_path)), kill)
    assert killed
    assert tally.programs == 4
    assert tally.verdicts["crashed"] <= 1


def test_the_command_ends_in_time(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    words = ["fuzz", "--minutes", "0.2", "--programs", "2", "--inner", "eager"]
    words += ["--out", str(tmp_path), "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "stem_compile.cli", *words], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode in (0, 3), done.stderr
    assert done.stdout.splitlines()[-1].startswith(("PASS", "FAIL"))
    assert json.loads(file.read_text())["settings"]["torch"] == torch.__version__
