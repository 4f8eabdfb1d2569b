"""One attention: this project against SDPA, FlexAttention on the same blocks and flash-attn-4, correctness gate first.

    python benchmarks/attention.py                                # 8K to 128K, published schedule
    python benchmarks/attention.py --lengths 131072 --budgets none,0.125 --poolings mean,max
    python benchmarks/attention.py --lengths 131072 --budgets 0.125,0.25 --poolings max --score-dtypes native,fp8
    python benchmarks/attention.py --million                      # 1,048,576 tokens, 4 query heads, 1 KV head:
    correctness, time, memory python benchmarks/attention.py --plot out/attention.json      # only draw the chart of an
    earlier run

Times are medians with the 20th and 80th percentile, milliseconds, of one process on one device. Contenders take turns,
so that the clocks that the device lowers under load, and whatever else it does, meet them alike. A contender that is
not within the tolerance of fp64 under the same selection, on sampled query blocks, is reported as wrong and never
timed. TFLOP/s count computed block pairs. Sink and local blocks are StemConfig's: 4 and 4 under the published schedule,
1 and 2 with a budget.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from stem_compile.algebra.blocks import cdiv
from stem_compile.config import StemConfig
from stem_compile.kernels import launch
from stem_compile.selection import Attention, BlockSelection, SelectionSpec
from stem_compile.testing.tolerances import RELATIVE
from stem_compile.timing import in_turns, timed

MASK = "kv <= q"


TURNS = 6


def measure(runs: dict[str, Callable[[], Any]], milliseconds: float) -> dict[str, dict[str, float]]:
    """Median and percentiles of each run in ms: about ``milliseconds`` of each, in ``TURNS`` turns, on warm code, with
    events around each."""
    repeats: dict[str, int] = {}
    for name, run in runs.items():
        run()
        once = timed(run, "cuda")[0]
        repeats[name] = min(40, max(1, round(milliseconds / TURNS / max(1e-2, once))))
    # The first call of a turn warms the caches for the run, untimed.
    times = in_turns(
        runs,
        "cuda",
        turns=TURNS,
        calls_a_turn=repeats,
        clock="device",
        before=lambda name, turn: (runs[name](), None)[1],
    )
    return {n: {"ms": t.median, "low": t.low, "high": t.high, "rounds": len(t.milliseconds)} for n, t in times.items()}


def ceilings() -> dict[str, float]:
    """Matrix rate in TFLOP/s (8192^3 bf16 on random data) and copy rate in TB/s, as this device gives them."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b = torch.randn_like(a)
    big = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(big)
    product, copy = measure({"": lambda: a @ b}, 300)[""], measure({"": lambda: other.copy_(big)}, 100)[""]
    return {"matrix": 2 * 8192**3 / product["ms"] / 1e9, "copy": 2 * big.numel() / copy["ms"] / 1e9}


class Problem:
    """q, k, v, the selection of one policy and what dense computes. q: [1, heads, n, d]."""

    def __init__(
        self, n: int, heads: int, key_heads: int, head_dim: int, dtype: torch.dtype, spec: SelectionSpec
    ) -> None:
        torch.manual_seed(n)
        shape = (1, heads, n, head_dim)
        self.q = torch.randn(shape, device="cuda", dtype=dtype)
        self.k, self.v = (torch.randn(1, key_heads, n, head_dim, device="cuda", dtype=dtype) for _ in range(2))
        self.n, self.spec, self.scale = n, spec, 1 / math.sqrt(head_dim)
        target = launch.target("cuda")
        assert target is not None
        self.target = target
        self.lists = self.select()
        self.blocks = self.lists.dense(self.attention.candidates)
        self.density = self.lists.density(self.attention.candidates)
        self.flop = 4.0 * float(self.blocks.sum()) * spec.block_q * spec.block_k * head_dim

    @property
    def attention(self) -> Attention:
        """The attention of one call: nothing is kept between calls."""
        return Attention(self.q, self.k, self.v, MASK, self.scale, self.spec.text())

    def select(self) -> BlockSelection:
        attention = self.attention
        return attention.selection(*self.target.select(attention, "select"))

    def attend(self, kernel: str) -> torch.Tensor:
        return self.target.attend(self.attention, self.lists, kernel)

    def whole(self, kernel: str) -> torch.Tensor:
        """Selection and attention."""
        self.lists = self.select()
        return self.attend(kernel)

    def dense(self, backend: str) -> torch.Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel({"FA2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}[backend]):
            return F.scaled_dot_product_attention(self.q, self.k, self.v, is_causal=True, enable_gqa=True)

    def flex(self) -> Callable[[], torch.Tensor]:
        """FlexAttention with the same blocks; compiled on first call."""
        from torch.nn.attention.flex_attention import BlockMask, flex_attention

        bq, bk = self.spec.block_q, self.spec.block_k
        rows, columns = self.blocks.shape[2:]
        r, c = torch.arange(rows, device="cuda")[:, None], torch.arange(columns, device="cuda")[None, :]
        partial = (c + 1) * bk > r * bq + 1

        def lists(computed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return computed.sum(-1).int(), torch.argsort(computed.int(), dim=-1, descending=True, stable=True).int()

        cut, full = lists(self.blocks & partial), lists(self.blocks & ~partial)
        mask = BlockMask.from_kv_blocks(
            *cut, *full, BLOCK_SIZE=(bq, bk), mask_mod=lambda b, h, q, kv: kv <= q, seq_lengths=(self.n, self.n)
        )
        compiled = torch.compile(flex_attention)
        return lambda: compiled(self.q, self.k, self.v, block_mask=mask, enable_gqa=True, scale=self.scale)

    def error(self, out: torch.Tensor, dense: bool = False) -> float:
        """Largest relative error of sampled query blocks against fp64 under the selection (or dense causal)."""
        worst = 0.0
        heads, group = self.q.shape[1], self.q.shape[1] // self.k.shape[1]
        bq, bk = self.spec.block_q, self.spec.block_k
        rows = self.lists.counts.shape[2]
        for head, row in (
            (0, 0),
            (0, rows - 1),
            (heads - 1, rows // 2),
            (heads // 2, rows * 3 // 4),
            (1, rows - 2),
            (heads - 2, rows // 3),
        ):
            here = torch.arange(row * bq, min((row + 1) * bq, self.n), device="cuda")
            kept = (
                torch.arange(cdiv(self.n, bk), device="cuda") * bk <= here[-1] if dense else self.blocks[0, head, row]
            )
            keys = (kept.nonzero() * bk + torch.arange(bk, device="cuda")).flatten()
            keys = keys[keys < self.n]
            scores = self.q[0, head, here].double() @ self.k[0, head // group, keys].double().T * self.scale
            weights = scores.masked_fill(keys[None, :] > here[:, None], -torch.inf).softmax(-1)
            expected = weights @ self.v[0, head // group, keys].double()
            worst = max(worst, float((out[0, head, here].double() - expected).norm() / expected.norm()))
        return worst


@dataclass(frozen=True)
class Contender:
    """Something to time. flop: what it computes, None where a rate means nothing. dense: whether it attends to
    everything, None: no output to check."""

    name: str
    run: Callable[[], Any]
    flop: float | None = None
    dense: bool | None = False


def gate(contender: Contender, problem: Problem, options: argparse.Namespace) -> dict[str, Any]:
    """Its line of the table so far: name, error against fp64, and whether that is too much or it does not run
    at all."""
    entry: dict[str, Any] = {"name": contender.name}
    try:
        out = contender.run()
        if contender.dense is not None:
            entry["error"] = problem.error(out, contender.dense)
            if not entry["error"] < RELATIVE[options.dtype][0]:
                entry["wrong"] = True
    except Exception as failure:  # a missing backend is a line of the table, not the end of the run
        entry["failed"] = f"{type(failure).__name__}: {str(failure).splitlines()[0][:160] if str(failure) else ''}"
    return entry


def contenders(
    problem: Problem, spec: SelectionSpec, options: argparse.Namespace, with_dense: bool
) -> Iterator[Contender]:
    """All that take part at one length and selection."""
    dense_flop = 4.0 * problem.n**2 / 2 * options.heads * options.head_dim
    kernels = [*(["hopper"] if torch.cuda.get_device_capability()[0] == 9 else []), "portable"]
    for kernel in kernels:
        yield Contender(kernel, functools.partial(problem.attend, kernel), problem.flop)
    yield Contender("selection", problem.select, dense=None)
    yield Contender(f"{kernels[0]} + selection", functools.partial(problem.whole, kernels[0]), problem.flop)
    if "flex" in options.against and spec.pooling == "mean":
        yield Contender("FlexAttention, same blocks", _once(problem.flex), problem.flop)
    if with_dense:
        for backend in ("FA2", "cuDNN"):
            if backend.lower() in options.against:
                yield Contender(f"SDPA {backend}", functools.partial(problem.dense, backend), dense_flop, dense=True)
        if "fa4" in options.against:
            yield Contender("flash-attn-4", _once(functools.partial(_flash4, problem)), dense_flop, dense=True)


def _once(build: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """What ``build`` returns, built at the first call, where it may fail."""
    built = functools.cache(build)
    return lambda: built()()


def compare(n: int, spec: SelectionSpec, options: argparse.Namespace, with_dense: bool) -> dict[str, Any]:
    """All contenders at one length and selection: gate, then time."""
    problem = Problem(n, options.heads, options.key_heads, options.head_dim, getattr(torch, options.dtype), spec)
    taking_part = list(contenders(problem, spec, options, with_dense))
    entries = [gate(c, problem, options) for c in taking_part]
    sound = [(c, e) for c, e in zip(taking_part, entries, strict=True) if "failed" not in e and not e.get("wrong")]
    times = measure({c.name: c.run for c, _ in sound}, options.milliseconds)
    for contender, entry in sound:
        entry |= times[contender.name]
        if contender.flop is not None:
            entry["tflops"] = contender.flop / entry["ms"] / 1e9
    return {
        "length": n,
        "budget": spec.budget,
        "pooling": spec.pooling,
        "scores": spec.score_dtype,
        "blocks": [spec.block_q, spec.block_k],
        "density": problem.density,
        "entries": entries,
    }


def _flash4(problem: Problem) -> Callable[[], torch.Tensor]:
    from flash_attn.cute import flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))

    def run() -> torch.Tensor:
        out = flash_attn_func(q, k, v, causal=True)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)  # type: ignore[no-any-return]

    return run


def pooling_of(result: dict[str, Any]) -> str:
    return str(result["pooling"]) + ("" if result["scores"] == "native" else f" ({result['scores']})")


def table(result: dict[str, Any], reference: float | None, ceiling: float) -> str:
    """Text of one comparison. reference: ms of the fastest dense SDPA at this length."""
    head = (
        f"\n{result['length']} tokens, budget {result['budget']}, {pooling_of(result)} pooling, blocks"
        f" {result['blocks']}, density {result['density']:.3f}"
    )
    lines = [head]
    for e in result["entries"]:
        if "ms" not in e:
            lines.append(
                f"  {e['name']:28s}"
                f" {'WRONG, error ' + format(e['error'], '.1e') if e.get('wrong') else e.get('failed')}"
            )
            continue
        text = f"  {e['name']:28s} {e['ms']:9.3f} ms [{e['low']:.3f}, {e['high']:.3f}]"
        if "tflops" in e:
            text += f"  {e['tflops']:6.0f} TFLOP/s {e['tflops'] / ceiling:5.0%} of matrix rate"
            text += f"  {reference / e['ms']:5.2f}x dense" if reference else ""
            text += f"  error {e['error']:.1e}"
        lines.append(text)
    return "\n".join(lines)


def specs(budget: float | None, options: argparse.Namespace) -> Iterator[SelectionSpec]:
    """Selections asked for at one budget."""
    for pooling in options.poolings.split(","):
        for scores in options.score_dtypes.split(",") if pooling == "max" else ["native"]:
            for blocks in options.blocks.split(","):
                bq, bk = map(int, blocks.split("x"))
                yield StemConfig(
                    budget=budget, pooling=pooling, score_dtype=scores, block_size=bq, key_block_size=bk
                ).selection


def million(options: argparse.Namespace) -> int:
    """One attention of 2^20 tokens: sampled query blocks against fp64, milliseconds, device memory beyond inputs and
    output."""
    wrong = 0
    for spec in specs(None, options):
        problem = Problem(1 << 20, 4, 1, options.head_dim, getattr(torch, options.dtype), spec)
        kernel = "hopper" if torch.cuda.get_device_capability()[0] == 9 else "portable"
        del problem.lists
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = problem.whole(kernel)
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()
        error = problem.error(out)
        wrong += not error < RELATIVE[options.dtype][0]
        del out
        times = measure(
            {"selection": problem.select, "whole": functools.partial(problem.whole, kernel)}, options.milliseconds
        )
        select, whole = times["selection"], times["whole"]
        rate = problem.flop / (whole["ms"] - select["ms"]) / 1e9
        print(
            f"1M tokens, {spec.pooling} pooling, {spec.score_dtype} scores, blocks {spec.block_q}x{spec.block_k},"
            f" density {problem.density:.3f}: {kernel} + selection {whole['ms']:.1f} ms, selection {select['ms']:.1f}"
            f" ms, {rate:.0f} TFLOP/s, error {error:.1e}, {extra / 1e9:.2f} GB beyond inputs and output",
            flush=True,
        )
    return int(wrong > 0)


def plot(data: dict[str, Any], path: Path) -> None:
    """Speed-up over the fastest dense SDPA and TFLOP/s: against length, or against budget where one length has
    several."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = {r["length"] for r in data["results"]}
    by_budget = len(lengths) == 1
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5))
    for index, axis in enumerate(axes):
        series: dict[str, list[tuple[float, float]]] = {}
        for result in data["results"]:
            dense = data["dense_ms"].get(str(result["length"]))
            for e in result["entries"]:
                if "tflops" not in e or dense is None or (by_budget and e["name"].startswith(("SDPA", "flash"))):
                    continue
                what = f"{pooling_of(result)} pooling" + (
                    "" if by_budget else f", {result['budget'] or 'published schedule'}"
                )
                what += (
                    "" if result["blocks"] == [128, 128] else f", blocks {result['blocks'][0]}x{result['blocks'][1]}"
                )
                name = e["name"] if e["name"].startswith(("SDPA", "flash")) else f"{e['name']} ({what})"
                at = result["density"] if by_budget else result["length"]
                series.setdefault(name, []).append((at, dense / e["ms"] if index == 0 else e["tflops"]))
        for name, points in series.items():
            axis.plot(*zip(*sorted(points)), marker="o", label=name)
        axis.set_xscale("log", base=2)
        if by_budget:
            axis.set_xlabel(
                f"part of the causal block pairs computed, {lengths.pop() if index else next(iter(lengths)):,} tokens"
            )
            ticks = sorted({r["density"] for r in data["results"]})
            axis.set_xticks(ticks, [f"{t:.0%}" if t > 0.1 else f"{t:.1%}" for t in ticks])
            axis.minorticks_off()
        else:
            axis.set_xlabel("tokens")
            axis.set_xticks(sorted(lengths), [f"{n // 1024}K" for n in sorted(lengths)])
        axis.set_ylabel(("speed-up over the fastest dense SDPA", "TFLOP/s")[index])
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.suptitle(f"{data['device']}, torch {data['torch']}, triton {data['triton']}: one attention")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="8192,16384,32768,65536,131072")
    parser.add_argument("--budgets", default="none", help="comma-separated fractions; none is the published schedule")
    parser.add_argument("--poolings", default="mean,max")
    parser.add_argument("--score-dtypes", default="native", help="of max pooling: native, fp8")
    parser.add_argument("--blocks", default="128x128", help="comma-separated query x key block sizes")
    parser.add_argument("--against", default="fa2,cudnn,flex,fa4")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--milliseconds", type=float, default=600, help="of runs per contender")
    parser.add_argument("--out", type=Path, default=Path("out/attention.json"))
    parser.add_argument("--million", action="store_true", help="only the 1M-token check")
    parser.add_argument("--plot", type=Path, help="draw the chart of this JSON and stop")
    options = parser.parse_args()
    if options.plot:
        plot(json.loads(options.plot.read_text()), options.plot.with_suffix(".png"))
        return 0
    if options.million:
        return million(options)
    import triton

    limits = ceilings()
    data: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ceilings": limits,
    }
    data |= {"results": [], "dense_ms": {}}
    print(
        f"{data['device']}, torch {torch.__version__}, triton {triton.__version__}: {limits['matrix']:.0f} TFLOP/s"
        f" matrix, {limits['copy']:.2f} TB/s copy"
    )
    wrong = False
    for n in map(int, options.lengths.split(",")):
        with_dense = True
        for budget in options.budgets.split(","):
            for spec in specs(None if budget == "none" else float(budget), options):
                result = compare(n, spec, options, with_dense)
                times = [e["ms"] for e in result["entries"] if e["name"].startswith("SDPA") and "ms" in e]
                if times:
                    data["dense_ms"][str(n)] = min(times)
                with_dense = False
                data["results"].append(result)
                wrong |= any(e.get("wrong") for e in result["entries"])
                print(table(result, data["dense_ms"].get(str(n)), limits["matrix"]), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(data, indent=1))
    try:
        plot(data, options.out.with_suffix(".png"))
    except ImportError:
        print("no matplotlib here: draw the chart elsewhere with --plot")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
