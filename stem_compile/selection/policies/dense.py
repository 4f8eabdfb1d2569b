"""Dense: every visible block, through the same kernels. The baseline that isolates kernels from selection."""

from __future__ import annotations

import sympy

from stem_compile.algebra.symbolic import BLOCKS
from stem_compile.selection import SelectionSpec
from stem_compile.selection.policy import Size

SCORED = False
ANY_ORDER = False


def budget(spec: SelectionSpec) -> sympy.Expr:
    """All blocks."""
    return BLOCKS


def width(spec: SelectionSpec, key_blocks: Size) -> Size:
    """No row is ever listed; one slot keeps the tensor's shape regular."""
    return 1


def min_length(spec: SelectionSpec) -> int:
    """Every prompt qualifies."""
    return 0
