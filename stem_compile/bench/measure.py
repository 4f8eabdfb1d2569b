"""One measured call: wall time and the memory it adds at its highest."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stem_compile.timing import timed


@dataclass(frozen=True)
class Measurement:
    """seconds: wall time. peak_bytes: memory above what was held before, at its highest; None where it cannot be known.
    output: the result."""

    seconds: float
    peak_bytes: int | None
    output: Any


def measured(device: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Measurement:
    """Call ``function(*args, **kwargs)`` once, under inference mode, on a quiet heap."""
    peak = PeakMemory(device)
    peak.start()
    with torch.inference_mode():
        milliseconds, output = timed(lambda: function(*args, **kwargs), device)
    return Measurement(milliseconds / 1e3, peak.bytes(), output)


class PeakMemory:
    """Memory that is held at most between ``start`` and ``bytes``, above what was held at ``start``.

    On a GPU torch's allocator counts. On Linux the kernel's high-water mark of resident pages does, and memory that
    was freed is given back first, since it would be taken again without showing.
    """

    def __init__(self, device: str | torch.device) -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._before: int | None = None

    def start(self) -> None:
        """Collect garbage and set the mark to the present."""
        gc.collect()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError):
            self._before = None
        else:
            self._before = _status("VmRSS")

    def bytes(self) -> int | None:
        """Bytes since ``start``; None where the system has no such mark."""
        peak = torch.cuda.max_memory_allocated() if self._cuda else _status("VmHWM")
        return None if self._before is None or peak is None else max(peak - self._before, 0)


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)
