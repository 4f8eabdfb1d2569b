"""Two runs that must select alike: the second computes what the first selected, and its own choice may differ by ties
only.

Rounding differs with the shapes of a run, so a block score next to another may swap places and change everything behind
it. Forcing the selection keeps outputs comparable; the choice itself is compared by its scores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from stem_compile.selection import FULL, BlockSelection, Observed
from stem_compile.selection import packed as end_to_end
from stem_compile.selection.oam import oam_scores
from stem_compile.testing.subject import Force
from stem_compile.testing.tolerances import MODEL
from stem_compile.testing.violation import Violation


def forced(wanted: Sequence[torch.Tensor], what: str) -> Force:
    """Computes ``wanted`` (bool [B, H, rows, key blocks], one an attention); Violation where the run's own selection
    differs by more than a tie."""

    def force(index: int, observed: Observed) -> BlockSelection | None:
        if index >= len(wanted):
            raise Violation(f"{what}: {index + 1} selections instead of {len(wanted)}")
        own, want = observed.selection.dense(observed.candidates), wanted[index]
        if own.shape != want.shape:
            raise Violation(
                f"{what}: attention {index} selects from {tuple(own.shape)} blocks instead of {tuple(want.shape)}"
            )
        if bool((own == want).all()):
            return None
        place = _beyond_a_tie(observed, own, want)
        if place is not None:
            b, h, r = place
            lists = f"{_listed(own[b, h, r])} instead of {_listed(want[b, h, r])}"
            raise Violation(
                f"{what}: attention {index} selects other blocks at (batch, head, query block) = {place}: {lists}"
            )
        return packed(want, observed)

    return force


def _listed(row: torch.Tensor) -> list[int]:
    return [int(i) for i in row.nonzero()[:, 0]]


def _beyond_a_tie(observed: Observed, own: torch.Tensor, want: torch.Tensor) -> tuple[int, ...] | None:
    """First row that differs by more than blocks whose scores rounding cannot tell apart; None without one."""
    q, k, scores = observed.attention.q, observed.attention.k, oam_scores(observed.attention)
    # No score exceeds the product of the norms (Cauchy-Schwarz), which is what rounding is relative to.
    largest = observed.attention.scale * float(
        torch.linalg.vector_norm(q.double(), dim=-1).max() * torch.linalg.vector_norm(k.double(), dim=-1).max()
    )
    noise = MODEL.factor * torch.finfo(q.dtype).eps * largest
    taken, left = own & ~want, want & ~own
    wrong = _unlike(scores, taken, left, noise)
    together = observed.attention.spec.sharing_heads(own.shape[1], k.shape[1])
    if together > 1:
        # What one head gives at a tie another may take.
        parts = (scores, taken & wrong.unsqueeze(-1), left & wrong.unsqueeze(-1))
        rows = [x.unflatten(1, (-1, together)).transpose(2, 3).flatten(3) for x in parts]
        wrong = wrong & _unlike(rows[0], rows[1], rows[2], noise).repeat_interleave(together, 1)
    return tuple(wrong.nonzero()[0].tolist()) if bool(wrong.any()) else None


def _unlike(scores: torch.Tensor, taken: torch.Tensor, left: torch.Tensor, noise: float) -> torch.Tensor:
    """Bool [..., rows]: rows in which ``taken`` blocks are not as many as those ``left`` for them, or in which their
    scores are not all one up to ``noise``: a row that takes worse blocks is as wrong as one that leaves them."""
    differing = taken | left
    highest = scores.masked_fill(~differing, -torch.inf).amax(-1)
    lowest = scores.masked_fill(~differing, torch.inf).amin(-1)
    # A block that is no candidate scores -inf; two of them differ by NaN, and are no tie either.
    tie = (highest - lowest <= noise) | ~differing.any(-1)
    unlike: torch.Tensor = (taken.sum(-1) != left.sum(-1)) | ~tie
    return unlike


def packed(dense: torch.Tensor, like: Observed) -> BlockSelection:
    """Block lists of a dense selection, in the shapes of the one observed."""
    selection = like.selection
    columns, width = selection.key_blocks, selection.lists.shape[-1]
    counts = dense.sum(-1)
    every = (dense == like.candidates.expand(dense.shape)).all(-1)
    order = torch.where(dense, torch.arange(columns, device=dense.device), columns).sort(-1).values[..., :width]
    full = every & ((selection.counts == FULL) | (counts > width))
    indices, counts = order.clamp(max=columns - 1).int(), torch.where(full, FULL, counts).int()
    if selection.indices.dim() == 3:
        indices = end_to_end(indices, counts, selection.indices.shape[-1] // counts.shape[1])
    return BlockSelection(indices, counts, selection.block_q, selection.block_k, columns)


def dense_of(selections: Sequence[Observed]) -> list[torch.Tensor]:
    """What a run computed, one bool [B, H, rows, key blocks] an attention."""
    return [observed.selection.dense(observed.candidates) for observed in selections]
