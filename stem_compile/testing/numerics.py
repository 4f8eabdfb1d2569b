"""When two results are equal: a tolerance measured on the model itself, never picked by hand.

The golden result is the model in fp64. The model in its own dtype is off from it by its rounding; a rewrite may be off
by a small factor of that, since it rounds in another order, plus some units in the last place of the result's own size,
where the model happens to be exact: ``tolerances.MODEL``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from stem_compile.testing.tolerances import MODEL


class Undefined(ArithmeticError):
    """The golden result is NaN at a position that counts, so nothing can be compared with it. where: indices of the
    position."""

    def __init__(self, where: tuple[int, ...]) -> None:
        super().__init__(f"the golden result is NaN at {where}")
        self.where = where


@dataclass(frozen=True)
class Gap:
    """The worst position. error, allowed: root mean square over the last dimension; ratio: error over what is allowed;
    where: indices of the position."""

    error: float
    allowed: float
    where: tuple[int, ...]

    @property
    def ratio(self) -> float:
        """Error over what is allowed; infinite where nothing is."""
        return self.error / self.allowed if self.allowed else float("inf")

    @property
    def ok(self) -> bool:
        """Whether the error is allowed."""
        return self.ratio <= 1

    @property
    def words(self) -> str:
        """Both numbers and their ratio, for people."""
        return f"error {self.error:.2e}, tolerance {self.allowed:.2e} ({self.ratio:.3g} times the tolerance)"


def errors(actual: torch.Tensor, golden: torch.Tensor) -> torch.Tensor:
    """Root mean square of the difference over the last dimension, fp64; infinite where only ``actual`` is not
    finite."""
    same = (actual.double() == golden.double()) | (actual.isnan() & golden.isnan())
    difference = (actual.double() - golden.double()).masked_fill(same, 0)
    return difference.square().mean(-1).sqrt().nan_to_num(nan=torch.inf, posinf=torch.inf)


def size(golden: torch.Tensor, valid: torch.Tensor | None = None) -> float:
    """Root mean square of the positions that count."""
    squares = golden.double().square().mean(-1).nan_to_num()
    kept = squares[valid] if valid is not None and valid.shape == squares.shape else squares
    return float(kept.mean().sqrt()) if kept.numel() else 0.0


def tolerance(
    eager: torch.Tensor, golden: torch.Tensor, dtype: torch.dtype, valid: torch.Tensor | None = None
) -> float:
    """Allowed error of a position: from the model's own, at its worst position. Raises Undefined."""
    lost = golden.isnan().any(-1)
    lost = lost & valid if valid is not None and valid.shape == lost.shape else lost
    if bool(lost.any()):
        raise Undefined(tuple(lost.nonzero()[0].tolist()))
    own = errors(eager, golden)
    own = own[valid] if valid is not None and valid.shape == own.shape else own
    worst = float(own.nan_to_num(posinf=0.0).max()) if own.numel() else 0.0
    return MODEL.allowed(worst, max(size(golden, valid), torch.finfo(torch.float32).tiny), dtype)


def gap(actual: torch.Tensor, golden: torch.Tensor, allowed: float, valid: torch.Tensor | None = None) -> Gap:
    """The worst position of ``actual`` against ``golden``. valid: bool, positions that count; None is all."""
    error = errors(actual, golden)
    if valid is not None and valid.shape == error.shape:
        error = error.masked_fill(~valid, 0)
    if not error.numel():
        return Gap(0.0, allowed, ())
    worst = int(error.argmax())
    return Gap(
        float(error.flatten()[worst]),
        allowed,
        tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape)),
    )


def first_beyond(
    actual: torch.Tensor, golden: torch.Tensor, allowed: float, valid: torch.Tensor | None = None
) -> tuple[int, ...] | None:
    """Indices of the earliest position (smallest along the second dimension) whose error is beyond the tolerance."""
    beyond = errors(actual, golden) > allowed
    if valid is not None and valid.shape == beyond.shape:
        beyond &= valid
    places = beyond.nonzero()
    if not len(places):
        return None
    return tuple(places[places[:, -1].argmin()].tolist())
