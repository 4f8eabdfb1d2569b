"""Selections as they are made at run time, for explain, tests and benchmarks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from stem_compile.selection.attention import Attention
from stem_compile.selection.spec import BlockSelection


@dataclass(frozen=True)
class Observed:
    """A selection made at run time and the attention it was made for, whose tensors may be overwritten later."""

    selection: BlockSelection
    attention: Attention

    @property
    def candidates(self) -> torch.Tensor:
        """Bool [B or 1, H or 1, rows, key blocks]: pairs that may hold a visible score."""
        return self.attention.mask.candidates(self.selection.block_q, self.selection.block_k)

    @property
    def density(self) -> float:
        """Computed over visible block pairs."""
        return self.selection.density(self.candidates)


Observer = Callable[[Observed], "BlockSelection | None"]

_observers: list[Observer] = []


@contextlib.contextmanager
def observe(callback: Observer) -> Iterator[None]:
    """Call ``callback`` for every selection that the operators make inside the ``with``: for explain and tests.

    A ``BlockSelection`` that it returns, of the same shapes, is computed instead of its own.
    """
    _observers.append(callback)
    try:
        yield
    finally:
        _observers.remove(callback)


def announce(observed: Observed) -> BlockSelection:
    """Tell the observers; the selection to compute. Free when there are none."""
    selection = observed.selection
    for callback in _observers:
        selection = callback(observed) or selection
    return selection
