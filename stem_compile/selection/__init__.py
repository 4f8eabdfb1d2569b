"""Which key blocks a query block computes: the specification, block scores (OAM), budgets (TPD) and the policies behind
them."""

from stem_compile.selection.spec import (
    FULL,
    BlockSelection,
    Observed,
    OptionValue,
    SelectionSpec,
    announce,
    observe,
    parse,
)

__all__ = ["FULL", "BlockSelection", "Observed", "OptionValue", "SelectionSpec", "announce", "observe", "parse"]
