"""Which key blocks a query block computes: the specification, block scores (OAM), budgets (TPD) and the policies behind
them."""

from stem_compile.selection.attention import Attention
from stem_compile.selection.observe import Observed, announce, observe
from stem_compile.selection.spec import FULL, BlockSelection, OptionValue, SelectionSpec, packed, parse, unpacked

__all__ = [
    "FULL",
    "Attention",
    "BlockSelection",
    "Observed",
    "OptionValue",
    "SelectionSpec",
    "announce",
    "observe",
    "packed",
    "parse",
    "unpacked",
]
