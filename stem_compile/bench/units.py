"""Quantities as people read them."""

from __future__ import annotations


def seconds(value: float) -> str:
    """``12.3 s`` or ``45.6 ms``."""
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def duration(value: float) -> str:
    """Whole seconds or minutes, for times that are only estimates: ``40 s``, ``12 min``."""
    return f"{value:.0f} s" if value < 90 else f"{value / 60:.0f} min"


def memory(size: int | None) -> str:
    """Bytes as ``1.2 GiB``, ``345 MiB``, or ``-`` where it is not known."""
    if size is None:
        return "-"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def share(value: float | None, digits: int = 0) -> str:
    """A part of one as ``43%``; ``-`` for None."""
    return "-" if value is None else f"{value:.{digits}%}"
