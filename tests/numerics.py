"""How far a result may be from fp64 or from eager, by the table of ``stem_compile.testing.tolerances``."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from stem_compile.testing.tolerances import ATTENTION, CLOSE, Closeness


def allowed_error(golden: torch.Tensor, eager: torch.Tensor) -> float:
    """Largest absolute error allowed against ``golden`` (fp64), given eager's result in the working dtype."""
    own = float((eager.double() - golden).abs().max())
    return ATTENTION.allowed(own, float(golden.abs().max().clamp(min=1e-30)), eager.dtype)


def assert_close(
    ours: Any, eager: Any, closeness: Closeness | None = None, computed: torch.dtype | None = None
) -> None:
    """Two results, or two tuples of them, of which neither is the truth, are equal but for rounding in the dtype that
    they were computed in, by default their own."""
    for a, b in zip(pytree.tree_leaves(ours), pytree.tree_leaves(eager), strict=True):
        rule = closeness or CLOSE[b.dtype if b.dtype in CLOSE else torch.float32]
        torch.testing.assert_close(a, b, **rule.bounds(computed or b.dtype))


def assert_close_by_largest(ours: torch.Tensor, eager: torch.Tensor) -> None:
    """The same for results whose entries cancel, such as logits: relative to the largest entry of all."""
    allowed = CLOSE[eager.dtype].bounds(eager.dtype)["rtol"] * float(eager.abs().max())
    torch.testing.assert_close(ours, eager, rtol=0, atol=allowed)


def assert_within(ours: torch.Tensor, golden: torch.Tensor, eager: torch.Tensor) -> None:
    """``ours`` has no NaN and is within the budget; the message gives both errors and the worst place."""
    assert ours.shape == golden.shape, f"shape {tuple(ours.shape)}, expected {tuple(golden.shape)}"
    assert not ours.isnan().any(), (
        f"NaN at {ours.isnan().nonzero()[0].tolist()}: memory that nothing wrote, or a softmax over nothing"
    )
    error = (ours.double() - golden).abs()
    allowed = allowed_error(golden, eager)
    worst = torch.unravel_index(error.argmax(), error.shape)
    assert float(error.max()) <= allowed, (
        f"error {float(error.max()):.3g} at {[int(i) for i in worst]}, allowed {allowed:.3g}"
    )
