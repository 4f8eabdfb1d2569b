"""Memory and machine as they are."""

from __future__ import annotations

import pytest
import torch

from stem_compile.bench import machine
from stem_compile.bench.measure import measured
from stem_compile.bench.units import memory, seconds


def test_measured_sees_memory_that_is_gone_when_it_returns() -> None:
    size = 256 << 20

    def hungry() -> int:
        return torch.ones(size, dtype=torch.uint8).numel()

    measurement = measured("cpu", hungry)
    if measurement.peak_bytes is None:
        pytest.skip("this system has no high-water mark that can be reset")
    assert measurement.output == size
    # The kernel counts resident pages in batches, a thread at a time.
    assert size - (1 << 20) <= measurement.peak_bytes < 1.5 * size
    modest = measured("cpu", lambda: 0)
    assert modest.peak_bytes is not None
    assert modest.peak_bytes < size / 8


def test_units() -> None:
    assert [seconds(0.0123), seconds(1.26)] == ["12.3 ms", "1.3 s"]
    assert [memory(None), memory(5 << 20), memory(3 << 29)] == ["-", "5 MiB", "1.50 GiB"]
    assert "torch" in machine.describe("cpu")
