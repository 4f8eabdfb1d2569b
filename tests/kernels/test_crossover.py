"""The crossover between dense and selected attention: read from races, kept on disk, obeyed by the passes, never
measured on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import stem_compile
from stem_compile.kernels import crossover
from stem_compile.kernels.contract import Stopwatch
from stem_compile.kernels.crossover import Question
from stem_compile.selection import Attention

WATCH = Stopwatch("a machine", lambda first, second: (1.0, 1.0))


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({2048: (1.0, 2.0), 4096: (2.0, 2.0), 8192: (4.0, 3.0)}, 8192),
        ({2048: (1.0, 0.5), 4096: (2.0, 3.0), 8192: (4.0, 3.0)}, 8192),
        ({2048: (1.0, 0.5), 4096: (2.0, 1.0)}, 2048),
        ({2048: (1.0, 0.99), 4096: (2.0, 1.97)}, crossover.NEVER),
        ({}, crossover.NEVER),
    ],
)
def test_selecting_must_win_at_every_longer_length(times: dict[int, tuple[float, float]], expected: int) -> None:
    assert crossover.crossing(times) == expected


def test_a_cpu_is_never_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossover, "_race", lambda *_: pytest.fail("measured"))
    x = torch.empty(1, 2, 8, 64)
    assert crossover.shortest(Attention(x, x, x), False, 77) == 77


def test_answers_survive_the_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("STEM_COMPILE_CACHE", str(tmp_path))
    races: list[int] = []

    def race(*arguments: Any) -> dict[int, tuple[float, float]]:
        races.append(1)
        return {2048: (1.0, 2.0), 4096: (2.0, 1.0)}

    monkeypatch.setattr(crossover, "_race", race)
    question = Question(torch.device("cuda"), torch.bfloat16, 32, 8, 128, 128, "", False, 2048), WATCH
    for _ in range(2):
        crossover._crossover.cache_clear()
        assert crossover._crossover(*question) == 4096
    assert len(races) == 1
    for path in tmp_path.iterdir():
        path.write_text("{")  # a damaged file is measured anew
    crossover._crossover.cache_clear()
    assert crossover._crossover(*question) == 4096
    assert len(races) == 2
    crossover._crossover.cache_clear()


def test_a_measurement_that_fails_refuses_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("STEM_COMPILE_CACHE", str(tmp_path))
    monkeypatch.setattr(crossover, "_race", lambda *_: 1 / 0)
    crossover._crossover.cache_clear()
    question = Question(torch.device("cuda"), torch.float16, 4, 4, 64, 64, "", False, 2048)
    assert crossover._crossover(question, WATCH) == 2048
    assert not list(tmp_path.iterdir())
    crossover._crossover.cache_clear()


def attention(x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.mark.parametrize(
    ("options", "decision"),
    [({}, "slower"), ({"min_length": 0}, None), ({"min_length": 4000}, "short"), ({"budget": None}, "short")],
)
def test_below_the_crossover_attention_stays_dense(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], decision: str | None
) -> None:
    monkeypatch.setattr(crossover, "shortest", lambda attention, masked, least: max(least, 3072))
    with torch.no_grad():
        told = stem_compile.explain(attention, {"budget": 0.25, **options})(torch.randn(1, 1, 2304, 16))
    assert [s["reason"] for s in told.sites] == [decision]
    if decision == "slower":
        assert "selecting wins from 3072" in str(told)


def test_a_symbolic_length_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossover, "shortest", lambda attention, masked, least: max(least, 3072))
    graphs: list[Any] = []
    from stem_compile import backend

    with torch.no_grad(), backend.listen(graphs.append):
        compiled = torch.compile(attention, backend="stem", options={"budget": 0.25, "inner": "eager"}, dynamic=True)
        for length in (2200, 2300, 2900, 100, 3072, 3500, 3333, 2500):
            compiled(torch.randn(1, 1, length, 16))
    assert [len(g.sites) for g in graphs] == [0, 1]


def test_any_device_that_can_be_timed_is_raced() -> None:
    """The race knows no device: it asks the target for kernels and the stopwatch for times."""
    raced: list[int] = []

    def milliseconds(dense: Any, selecting: Any) -> tuple[float, float]:
        dense(), selecting()
        raced.append(1)
        return 4.0, 1.0

    for masked in (False, True):
        question = Question(torch.device("cpu"), torch.float32, 2, 1, 16, 16, "budget=0.25,pooling=max", masked, 2048)
        assert crossover._race(question, Stopwatch("a machine", milliseconds)) == {2048: (4.0, 1.0)}
    assert len(raced) == 2
