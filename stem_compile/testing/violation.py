"""What a property that does not hold raises, and the sentence and snippet that a reader gets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from stem_compile.testing.numerics import Gap


class Violation(AssertionError):
    """A property does not hold for an example. ``message`` says what differs and where, in words; ``gap`` by
    how much."""

    def __init__(self, message: str, gap: Gap | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.gap = gap


class Inapplicable(Exception):
    """A property says nothing about this model or these options; the message says why."""


@dataclass
class Measure:
    """What an example that holds showed. worst: largest error over its tolerance (0 where a property has none); facts:
    numbers for the report."""

    worst: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


def require(gap: Gap, what: str, place: str = "") -> Measure:
    """A measure of ``gap``, or Violation when it is beyond its tolerance."""
    if not gap.ok:
        where = f" at {named(gap.where)}" if gap.where else ""
        raise Violation(f"{what}: {gap.words}{where}{'; ' + place if place else ''}", gap)
    return Measure(gap.ratio)


def named(where: tuple[int, ...]) -> str:
    """Indices of an output position in words."""
    if len(where) == 2:
        return f"batch row {where[0]}, position {where[1]}"
    if len(where) == 3:
        return f"batch row {where[0]}, head {where[1]}, position {where[2]}"
    return f"index {where}"
