"""The timer: turns, warm-up, limits and hooks."""

from __future__ import annotations

import time

import pytest

from stem_compile.timing import Timing, in_turns, timed


def test_percentiles_are_of_the_repeats() -> None:
    timing = Timing((5.0, 1.0, 3.0, 2.0, 4.0))
    assert (timing.low, timing.median, timing.high) == (2.0, 3.0, 5.0)
    assert Timing((7.0,)).low == Timing((7.0,)).high == 7.0


def test_timed_is_wall_time_in_milliseconds() -> None:
    milliseconds, result = timed(lambda: time.sleep(0.02) or "done")
    assert result == "done"
    assert 20 <= milliseconds < 200


def test_calls_take_turns_after_their_warm_up() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    hooks: list[tuple[str, object]] = []
    times = in_turns(
        calls,
        turns=2,
        warmup=1,
        calls_a_turn={"a": 1, "b": 2},
        before=lambda name, turn: hooks.append((name, turn)),
        after=lambda name, ms: hooks.append((name, ms >= 0)),
    )
    assert "".join(order) == "ab" + "abb" * 2
    assert [len(times[n].milliseconds) for n in "ab"] == [2, 4]
    assert hooks == [(n, x) for turn in (0, 1) for n in "ab" for x in (turn, True)]


@pytest.mark.parametrize(("milliseconds", "most", "expected"), [(0, None, 3), (1e9, 7, 7)])
def test_turns_go_on_until_time_is_spent_or_there_are_enough(
    milliseconds: float, most: int | None, expected: int
) -> None:
    times = in_turns({"a": lambda: None}, turns=3, milliseconds=milliseconds, most_turns=most)
    assert len(times["a"].milliseconds) == expected


def test_time_between_the_calls_is_not_counted() -> None:
    times = in_turns({"a": lambda: None}, turns=2, before=lambda *_: time.sleep(0.02))
    assert times["a"].high < 10
