"""What a selection policy is: the one definition that documents, package and tests refer to.

A policy is anything with the names of ``Policy``; the built-in ones are modules in ``policies/``. One with options of
its own also has ``OPTIONS``, a tuple of ``Option``.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import sympy
import torch

from stem_compile.selection.spec import OptionValue, SelectionSpec

Size = int | torch.SymInt


@runtime_checkable
class Policy(Protocol):
    """How many blocks each row of query blocks computes. Which ones: the best by block scores, sinks and local blocks
    always.

    SCORED: whether blocks are ranked; without it every row computes everything it sees. ANY_ORDER: whether the policy
    means something where later keys are not hidden from earlier queries (bidirectional encoders).
    """

    SCORED: bool
    ANY_ORDER: bool

    def budget(self, spec: SelectionSpec, /) -> sympy.Expr:
        """Blocks that row ``ROW`` of ``BLOCKS`` computes (``algebra.symbolic``), at least 1: integer arithmetic of the
        functions that masks may use, so that it is exact on every device."""
        ...

    def width(self, spec: SelectionSpec, key_blocks: Size, /) -> Size:
        """Upper bound of ``budget`` and of the forced blocks over the rows of ``key_blocks`` that are not full: affine
        in ``key_blocks``."""
        ...

    def min_length(self, spec: SelectionSpec, /) -> int:
        """Fewest keys worth selecting on."""
        ...


@dataclass(frozen=True)
class Option:
    """An option that a policy adds to the backend's. name: an identifier. default: decides the type (bool, int, float
    or str). low, high: bounds of a number, inclusive. choices: allowed values; a str needs them."""

    name: str
    default: OptionValue
    low: float | None = None
    high: float | None = None
    choices: tuple[OptionValue, ...] = ()

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"option {self.name!r}: the name of an option is an identifier")
        if isinstance(self.default, str) and not self.choices:
            raise ValueError(f"option {self.name!r}: a str needs choices")
        if any(set(",=") & set(str(value)) for value in self.choices):
            raise ValueError(f"option {self.name!r}: no comma and no equals sign in {self.choices}")
        self.checked(self.default)

    def checked(self, value: object) -> OptionValue:
        """``value`` in the option's type. Raises ValueError naming what is allowed."""
        if self.choices:
            if not any(type(value) is type(choice) and value == choice for choice in self.choices):
                near = difflib.get_close_matches(str(value), [str(c) for c in self.choices], n=1, cutoff=0.5)
                hint = f"; did you mean {near[0]!r}?" if near and isinstance(value, str) else ""
                raise ValueError(f"{self.name}={value!r} is not one of {', '.join(map(repr, self.choices))}{hint}")
            assert isinstance(value, bool | int | float | str)
            return value
        if isinstance(self.default, bool):
            if not isinstance(value, bool):
                raise ValueError(f"{self.name}={value!r}: True or False")
            return value
        whole = isinstance(self.default, int)
        low, high = -float("inf") if self.low is None else self.low, float("inf") if self.high is None else self.high
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not low <= value <= high:
            raise ValueError(f"{self.name}={value!r}: {'an integer' if whole else 'a number'} in [{low:g}, {high:g}]")
        return value if whole else float(value)

    def read(self, text: str) -> OptionValue:
        """The value that ``str`` wrote. Raises ValueError for text that is none."""
        if self.choices:
            return next((c for c in self.choices if str(c) == text), text)
        if isinstance(self.default, bool):
            return {"True": True, "False": False}.get(text, text)
        return int(text) if isinstance(self.default, int) else float(text)
