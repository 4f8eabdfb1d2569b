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
from stem_compile.distributed.balance import blocks_of_rows, table

BUDGETS = (0.0625, 0.125, 0.25, 0.5, 1.0)


def blocks_of_ranks(
    rows: torch.Tensor, ranks: int, order: str = "zigzag", held: tuple[tuple[int, ...], ...] = ()
) -> torch.Tensor:
    """Blocks that each of ``ranks`` ranks computes: int64 [ranks]. rows: blocks a row, whole chunks of them. held: a
    table of chunks in place of the order's. Raises SplitError where rows are no whole chunks."""
    return torch.stack([TokenSplit("", rank, ranks, order, held).part(rows, 0).sum() for rank in range(ranks)])


def imbalance(blocks: torch.Tensor) -> float:
    """Busiest rank over the mean, less 1."""
    return float(blocks.max() / blocks.double().mean() - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="8")
    parser.add_argument("--lengths", default="131072")
    given = parser.parse_args()
    print("| tokens | ranks | budget | blocks a head | balanced | zigzag | contiguous |\n|---|---|---|---|---|---|---|")
    for tokens in map(int, given.lengths.split(",")):
        for ranks in map(int, given.ranks.split(",")):
            for budget in BUDGETS:
                spec = StemConfig(budget=budget).selection_of(0)
                rows = blocks_of_rows(spec, tokens)
                splits = [blocks_of_ranks(rows, ranks, held=table(spec, tokens, ranks))]
                splits += [blocks_of_ranks(rows, ranks, order) for order in ORDERS]
                shares = [f"{imbalance(blocks):.1%}" for blocks in splits]
                print(f"| {tokens:,} | {ranks} | {budget} | {int(rows.sum()):,} | {' | '.join(shares)} |", flush=True)


if __name__ == "__main__":
    main()
