"""How evenly the computed blocks of one causal prompt fall on the ranks of a context-parallel group.

    python benchmarks/scaling.py                                     # 8 ranks, 128K tokens, budgets 0.0625 to 1.0
    python benchmarks/scaling.py --ranks 8,64 --lengths 1048576

Counted from the budgets' formulas, which depend on the length alone: no device is needed, and nothing is timed.
Imbalance is the busiest rank's blocks over the mean of all ranks, less one.
"""

from __future__ import annotations

import argparse

import torch

from stem_compile.config import StemConfig
from stem_compile.distributed import ORDERS, TokenSplit
from stem_compile.selection import SelectionSpec
from stem_compile.selection.tpd import full_rows, row_limits

BUDGETS = (0.0625, 0.125, 0.25, 0.5, 1.0)


def blocks_of_rows(spec: SelectionSpec, tokens: int) -> torch.Tensor:
    """Blocks that each row of blocks of a causal prompt computes: int64 [query blocks]."""
    ends = torch.arange(0, tokens, spec.block_q).add(spec.block_q).clamp(max=tokens)
    visible = (ends + spec.block_k - 1) // spec.block_k
    limit = row_limits(visible, spec)
    return torch.where(full_rows(visible, limit, spec), visible, limit)


def blocks_of_ranks(rows: torch.Tensor, ranks: int, order: str) -> torch.Tensor:
    """Blocks that each of ``ranks`` ranks computes: int64 [ranks]. rows: blocks a row, whole chunks of them. Raises
    SplitError where they are none."""
    return torch.stack([TokenSplit("", rank, ranks, order).part(rows, 0).sum() for rank in range(ranks)])


def imbalance(blocks: torch.Tensor) -> float:
    """Busiest rank over the mean, less 1."""
    return float(blocks.max() / blocks.double().mean() - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="8")
    parser.add_argument("--lengths", default="131072")
    given = parser.parse_args()
    print("| tokens | ranks | budget | blocks a head | zigzag | contiguous |\n|---|---|---|---|---|---|")
    for tokens in map(int, given.lengths.split(",")):
        for ranks in map(int, given.ranks.split(",")):
            for budget in BUDGETS:
                rows = blocks_of_rows(StemConfig(budget=budget).selection_of(0), tokens)
                shares = [f"{imbalance(blocks_of_ranks(rows, ranks, order)):.1%}" for order in ORDERS]
                print(f"| {tokens:,} | {ranks} | {budget} | {int(rows.sum()):,} | {' | '.join(shares)} |", flush=True)


if __name__ == "__main__":
    main()
