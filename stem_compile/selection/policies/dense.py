"""Dense: every visible block, through the same kernels. The baseline that isolates kernels from selection."""

from __future__ import annotations

from typing import Any

from stem_compile.algebra.symbolic import BLOCKS
from stem_compile.selection import SelectionSpec

SCORED = False
ANY_ORDER = False


def budget(spec: SelectionSpec) -> Any:
    """All blocks."""
    return BLOCKS


def width(spec: SelectionSpec, key_blocks: Any) -> Any:
    """No row is ever listed; one slot keeps the tensor's shape regular."""
    return 1


def min_length(spec: SelectionSpec) -> int:
    """Every prompt qualifies."""
    return 0
