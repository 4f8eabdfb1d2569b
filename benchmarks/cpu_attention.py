"""One attention on a CPU: this project, selection apart and included, against SDPA's dense causal attention;
correctness gate first.

    python benchmarks/cpu_attention.py                                     # 4K, 8K and 16K, fp32 and bf16, budget 0.25
    python benchmarks/cpu_attention.py --lengths 16384 --budgets 0.125,1.0 --poolings max --json out/cpu.json

Contenders take turns within a round, so what else runs on the machine meets them alike. Times are medians over the
rounds in ms; the ratio is the median over the rounds, dense over ours with selection, and its spread from the 20th to
the 80th percentile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from stem_compile import selection
from stem_compile.algebra.blocks import candidates
from stem_compile.algebra.masks import decode
from stem_compile.bench.machine import processor
from stem_compile.bench.measure import measured
from stem_compile.bench.terminal import Progress, Table, width
from stem_compile.kernels.targets.cpu import target as cpu
from stem_compile.selection import Attention, BlockSelection, SelectionSpec
from stem_compile.testing.tolerances import SAMPLED_ROWS
from stem_compile.timing import in_turns

MASK = "kv <= q"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLES = 5
"""Query row blocks the gate looks at."""


def error(
    out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lists: BlockSelection, scale: float
) -> tuple[float, float]:
    """(ours, SDPA's) largest absolute error against fp64 on sampled query row blocks, the first and the last among
    them."""
    batch, heads, length, _ = q.shape
    dense = lists.dense(
        candidates(decode(MASK), (batch, heads, length, k.shape[2]), [], [], lists.block_q, lists.block_k, "cpu")
    )
    rows = dense.shape[2]
    worst = [0.0, 0.0]
    for row in sorted({i * (rows - 1) // (SAMPLES - 1) for i in range(SAMPLES)}):
        tokens = slice(row * lists.block_q, min((row + 1) * lists.block_q, length))
        visible = dense[:, :, row, None].repeat_interleave(lists.block_k, -1)[..., : k.shape[2]]
        visible = visible & (torch.arange(k.shape[2]) <= torch.arange(tokens.start, tokens.stop)[:, None])
        golden, plain = (
            F.scaled_dot_product_attention(
                q[:, :, tokens].to(t), k.to(t), v.to(t), attn_mask=visible, scale=scale, enable_gqa=True
            )
            for t in (torch.float64, q.dtype)
        )
        for i, x in enumerate((out[:, :, tokens], plain)):
            worst[i] = max(worst[i], float((x.double() - golden).abs().max()))
    return worst[0], worst[1]


def peak_memory(run: Callable[[], Any]) -> float | None:
    """MiB by which one call raises the process's peak; None where the system does not say."""
    added = measured("cpu", run).peak_bytes
    return None if added is None else added / 2**20


def benchmark(length: int, dtype: torch.dtype, spec: SelectionSpec, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table. Raises SystemExit when the result is wrong: nothing wrong is timed."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, h, length, options.dim, generator=generator).to(dtype)
        for h in (options.heads, options.key_heads, options.key_heads)
    )
    scale, text = options.dim**-0.5, spec.text()

    def attention() -> Attention:
        # Of one call: nothing is kept between calls.
        return Attention(q, k, v, MASK, scale, text)

    names = cpu.kernels(attention())

    def select() -> BlockSelection:
        fresh = attention()
        return fresh.selection(*cpu.select(fresh, names.select))

    def attend() -> torch.Tensor:
        return cpu.attend(attention(), lists, names.attend)

    def dense() -> torch.Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=options.heads != options.key_heads
        )

    lists, possible = select(), attention().candidates
    lists.check(possible)
    ours, theirs = error(attend(), q, k, v, lists, scale)
    if not ours <= SAMPLED_ROWS.allowed(theirs, 1.0, dtype):
        raise SystemExit(f"wrong at {length} {dtype}: error {ours:.2e}, SDPA's {theirs:.2e}")
    memory = {"dense_mib": peak_memory(dense), "ours_mib": peak_memory(lambda: (select(), attend()))}
    # The contenders take turns for about this time, at least 5 rounds.
    times = in_turns({"dense": dense, "select": select, "attend": attend}, turns=5, milliseconds=1e3 * options.seconds)
    ratios = sorted(d / (s + a) for d, s, a in zip(*(t.milliseconds for t in times.values())))
    return {
        "length": length,
        "dtype": str(dtype).removeprefix("torch."),
        "budget": spec.budget,
        "pooling": spec.pooling,
        "density": lists.density(possible),
        "kernel": names.attend,
        "error": ours,
        "sdpa_error": theirs,
        "rounds": len(ratios),
        **{f"{name}_ms": t.median for name, t in times.items()},
        "ratio": statistics.median(ratios),
        "low": ratios[len(ratios) // 5],
        "high": ratios[len(ratios) * 4 // 5],
        **memory,
    }


COLUMNS = (
    "length",
    "dtype",
    "budget",
    "pooling",
    "density",
    "dense ms",
    "select ms",
    "attend ms",
    "ours ms",
    "speed-up",
    "spread",
    "peak MiB, dense",
    "ours",
)


def table(results: list[dict[str, Any]]) -> Table:
    """The results for a terminal."""
    rows = [
        (
            f"{r['length']:,}",
            r["dtype"],
            str(r["budget"]),
            r["pooling"],
            f"{r['density']:.3f}",
            f"{r['dense_ms']:.0f}",
            f"{r['select_ms']:.1f}",
            f"{r['attend_ms']:.0f}",
            f"{r['select_ms'] + r['attend_ms']:.0f}",
            f"{r['ratio']:.2f}x",
            f"{r['low']:.2f} to {r['high']:.2f}",
            *("-" if r[x] is None else f"{r[x]:.0f}" for x in ("dense_mib", "ours_mib")),
        )
        for r in results
    ]
    return Table(f"causal attention, {torch.get_num_threads()} threads, {machine()}", COLUMNS, rows)


def machine() -> str:
    """The processor and what PyTorch uses of it."""
    return f"{processor()}, {torch.backends.cpu.get_cpu_capability()}"


def numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Argument type: values separated by commas."""
    return lambda text: [kind(x) for x in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=numbers(int), default=[4096, 8192, 16384])
    parser.add_argument("--dtypes", type=numbers(str), default=["fp32", "bf16"], help=", ".join(DTYPES))
    parser.add_argument(
        "--budgets",
        type=numbers(lambda x: None if x == "none" else float(x)),
        default=[0.25],
        help="shares, or none for the published schedule",
    )
    parser.add_argument("--poolings", type=numbers(str), default=["mean"], help="mean, max")
    parser.add_argument("--blocks", type=numbers(int), default=[128, 128], help="query block, key block")
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--key-heads", type=int, default=3)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each row of the table")
    parser.add_argument("--json", type=Path, help="also write the results there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    cases = list(itertools.product(options.lengths, options.dtypes, options.budgets, options.poolings))
    progress = Progress(len(cases))
    for length, dtype, budget, pooling in cases:
        progress.doing(f"{length} {dtype} budget {budget} {pooling}")
        spec = SelectionSpec(budget=budget, pooling=pooling, block_q=options.blocks[0], block_k=options.blocks[1])
        assert selection.parse(spec.text()) == spec
        results.append(benchmark(length, DTYPES[dtype], spec, options))
        progress.finished(f"{length} {dtype} budget {budget} {pooling}: {results[-1]['ratio']:.2f}x")
    print(table(results).text(width()))
    if len(results) > 1:
        print(f"geometric mean {math.prod(r['ratio'] for r in results) ** (1 / len(results)):.2f}x")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps(
                {
                    "processor": machine(),
                    "torch": torch.__version__,
                    "cores": os.cpu_count(),
                    "threads": options.threads,
                    "results": results,
                },
                indent=1,
            )
        )


if __name__ == "__main__":
    main()
