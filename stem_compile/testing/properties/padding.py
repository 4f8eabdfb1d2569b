"""Padding invariance: the tokens of a padded row get the outputs that they get alone, without padding.

Batches pad; a kernel that ignores the mask, a selection that spends its budget on pads, or a NaN that leaks out of a
row without keys gives answers that depend on the neighbours. Left pads in whole query blocks leave the blocks' grid in
place, so selections must agree too (up to ties); other left pads shift the grid, where only ``budget=1.0`` can promise
anything. Right pads may have any length.
"""

from __future__ import annotations

from typing import Any

import torch

from stem_compile.testing import numerics
from stem_compile.testing.agreement import dense_of, forced
from stem_compile.testing.case import Case, Inputs, packed
from stem_compile.testing.invariance import own_holds
from stem_compile.testing.subject import Subject
from stem_compile.testing.violation import Inapplicable, Measure, require

NAME = "padding-invariance"
TITLE = "a padded row equals itself alone"
ORDER = 6
EXAMPLES = 10


def cases(subject: Subject) -> Any:
    """Strategy of the examples to try. Raises Inapplicable where the property says nothing about the subject."""
    from hypothesis import strategies as st

    from stem_compile.testing.lengths import bounds, sparse
    from stem_compile.testing.strategies import seeds

    if "padding" not in subject.source.can:
        raise Inapplicable("the inputs have no padding mask")
    if subject.expected == 0:
        raise Inapplicable("no attention is expected to be rewritten")
    low, high = bounds(subject)
    lengths, drawn = (sparse(subject) if subject.large else st.integers(low, high)), seeds(subject.source)
    blocks = st.integers(1, 1 if subject.large else 2).map(lambda n: n * subject.block)
    left = st.builds(lambda n, pad, seed: Case(n + pad, 2, seed, pad), lengths, blocks, drawn)
    ragged = st.builds(
        lambda n, pad, seed: Case(n + pad, 2, seed, pad),
        st.integers(1, 2 * subject.block),
        st.integers(1, subject.block - 1),
        drawn,
    )
    right = st.builds(
        lambda n, pad, seed: Case(n + pad, 2, seed, pad, "right"), lengths, st.integers(1, subject.block + 1), drawn
    )
    return st.one_of(left, ragged, right)


def alone(inputs: Inputs, case: Case) -> Inputs:
    """The last row's own tokens. Positions stay, the mask goes: it would be all ones."""
    kept = slice(case.pad, None) if case.side == "left" else slice(0, case.length - case.pad)
    row = inputs.row(case.batch - 1, case.batch).tensors(
        lambda x: packed(x[:, kept]) if x.dim() > 1 and x.shape[1] == case.length else x
    )
    return row.unpadded()


def check(subject: Subject, case: Case) -> Measure:
    """Whether the property holds on one example: how close it came to failing. Raises Violation where it does not."""
    padded = subject.inputs(case)
    single = alone(padded, case)
    kept = slice(case.pad, None) if case.side == "left" else slice(0, case.length - case.pad)
    allowed = subject.tolerance(case)

    def last(x: torch.Tensor) -> torch.Tensor:
        return x[-1:, kept]

    own_holds(subject, padded, single, last, lambda x: x, allowed)
    on_grid = case.side == "right" or case.pad % subject.block == 0
    changes: dict[str, Any] = {} if on_grid else {"budget": 1.0}
    run = subject.run(padded, **changes) if changes else subject.run_of(case)
    wanted = [_cut(dense, subject, case) for dense in dense_of(run.selections)] if on_grid else []
    what = f"the row with {case.pad} pads on the {case.side}, alone"
    lone = subject.run(single, forced(wanted, what) if on_grid else None, **changes)
    return require(
        numerics.gap(last(run.output), lone.output, allowed),
        f"the row with {case.pad} pads on the {case.side} differs from itself alone",
    )


def _cut(dense: torch.Tensor, subject: Subject, case: Case) -> torch.Tensor:
    """The last row's selection in the blocks of its own tokens."""
    size = case.length - case.pad
    rows, columns = -(-size // subject.block), -(-size // subject.key_block)
    first_row, first_column = (
        (case.pad // subject.block, case.pad // subject.key_block) if case.side == "left" else (0, 0)
    )
    return dense[-1:, :, first_row : first_row + rows, first_column : first_column + columns]
