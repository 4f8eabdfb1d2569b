"""Error budgets: how far a result may be from fp64, measured by how far plain torch is on the same inputs in the same
dtype."""

from __future__ import annotations

import torch

FACTOR = 3.0
"""Our error over eager's. Two roundings in another order stay well under it; a wrong mask, scale or block is orders of
magnitude over."""
FLOOR = 4.0
"""Ulps of the output's largest value granted when eager happens to be exact."""


def budget(golden: torch.Tensor, eager: torch.Tensor) -> float:
    """Largest absolute error allowed against ``golden`` (fp64), given eager's result in the working dtype."""
    ulp = torch.finfo(eager.dtype).eps * float(golden.abs().max().clamp(min=1e-30))
    return FACTOR * float((eager.double() - golden).abs().max()) + FLOOR * ulp


def assert_within(ours: torch.Tensor, golden: torch.Tensor, eager: torch.Tensor) -> None:
    """``ours`` has no NaN and is within the budget; the message gives both errors and the worst place."""
    assert ours.shape == golden.shape, f"shape {tuple(ours.shape)}, expected {tuple(golden.shape)}"
    assert not ours.isnan().any(), (
        f"NaN at {ours.isnan().nonzero()[0].tolist()}: memory that nothing wrote, or a softmax over nothing"
    )
    error = (ours.double() - golden).abs()
    allowed = budget(golden, eager)
    worst = torch.unravel_index(error.argmax(), error.shape)
    assert float(error.max()) <= allowed, (
        f"error {float(error.max()):.3g} at {[int(i) for i in worst]}, allowed {allowed:.3g}"
    )
