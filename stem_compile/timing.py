"""The one timer of the benchmarks, the command line and the crossover: calls that take turns on one device.

Turns matter: the clocks that a device lowers under load, and whatever else the machine does, then meet all calls alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

Clock = Literal["host", "device"]
"""host: wall time of a call and of the device work it queues. device: time between two CUDA events around the call, so
that the launch is not counted where other work is queued before it. On a CPU both are the wall time."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Timing:
    """Times of one call. milliseconds: each timed repeat, in the order they ran; at least one."""

    milliseconds: tuple[float, ...]

    def quantile(self, part: float) -> float:
        """The time that ``part`` of the repeats do not exceed, by nearest rank. part: in [0, 1)."""
        return sorted(self.milliseconds)[int(len(self.milliseconds) * part)]

    @property
    def median(self) -> float:
        """Milliseconds."""
        return self.quantile(0.5)

    @property
    def low(self) -> float:
        """20th percentile, milliseconds."""
        return self.quantile(0.2)

    @property
    def high(self) -> float:
        """80th percentile, milliseconds."""
        return self.quantile(0.8)


def timed(call: Callable[[], Result], device: str | torch.device = "cpu") -> tuple[float, Result]:
    """(wall milliseconds, result) of one call, the device work that it queues included."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call()
    if cuda:
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start), result


def in_turns(
    calls: Mapping[str, Callable[[], object]],
    device: str | torch.device = "cpu",
    *,
    turns: int = 1,
    milliseconds: float = 0.0,
    most_turns: int | None = None,
    calls_a_turn: Mapping[str, int] | None = None,
    warmup: int = 0,
    clock: Clock = "host",
    queued_before: Callable[[], object] | None = None,
    before: Callable[[str, int], None] | None = None,
    after: Callable[[str, float], None] | None = None,
) -> dict[str, Timing]:
    """Time every call in turns: each runs once (or ``calls_a_turn``) in each turn.

    turns: at least that many; more until all together took ``milliseconds``, at most ``most_turns``. warmup: calls of
    each before anything is timed. queued_before: device work put before each timed call, as a model has it, so that
    launching does not count (``clock="device"``). before(name, turn) and after(name, milliseconds) run outside the
    clock, around each turn of a call.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    turn, spent = 0, 0.0
    while turn < turns or (spent < milliseconds and (most_turns is None or turn < most_turns)):
        for name, call in calls.items():
            if before is not None:
                before(name, turn)
            repeats = 1 if calls_a_turn is None else calls_a_turn[name]
            batch = _batch(call, torch.device(device), repeats, clock, queued_before)
            times[name] += batch
            spent += sum(batch)
            if after is not None:
                after(name, sum(batch))
        turn += 1
    return {name: Timing(tuple(batch)) for name, batch in times.items()}


def _batch(
    call: Callable[[], object],
    device: torch.device,
    repeats: int,
    clock: Clock,
    queued_before: Callable[[], object] | None,
) -> list[float]:
    """Milliseconds of ``repeats`` calls, one after the other."""
    if device.type != "cuda" or clock == "host":
        return [timed(call, device)[0] for _ in range(repeats)]
    torch.cuda.synchronize(device)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        if queued_before is not None:
            queued_before()
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [float(begin.elapsed_time(end)) for begin, end in events]
