"""Selection by pooled mass on a GPU: correctness first, then the time of its parts and of selection and attention.

``python benchmarks/selection.py [--lengths 8192,32768,131072] [--variants]``. One attention of 32 query heads, 8 key
heads, head dim 128, bf16, causal. Medians; ``--variants`` times launch configurations of the Hopper kernel as well.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from stem_compile.kernels.targets.cuda import masses, target
from stem_compile.kernels.targets.cuda.selection import select
from stem_compile.selection import Attention, SelectionSpec, tpd
from stem_compile.selection.mass import log_masses

CAUSAL = "kv <= q"


def inputs(length: int, heads: int = 32, key_heads: int = 8, dim: int = 128, seed: int = 0) -> tuple[Any, ...]:
    """q, k, v whose neighbouring tokens are alike, as they are in models."""
    tensors = []
    generator = torch.Generator(device="cuda").manual_seed(seed)
    for h in (heads, key_heads, key_heads):
        coarse = torch.randn(1, h, length // 16 + 2, dim, device="cuda", generator=generator)
        x = coarse.repeat_interleave(16, 2)[:, :, :length]
        fine = torch.randn(1, h, length, dim, device="cuda", generator=generator)
        tensors.append((x + 0.7 * fine).bfloat16())
    return tensors[0] * 1.5, tensors[1], tensors[2]


def milliseconds(run: Callable[[], Any], rounds: int = 9) -> float:
    for _ in range(3):
        run()
    times: list[float] = []
    for _ in range(rounds):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def spec_of(groups: tuple[int, int], budget: float = 0.25, block_k: int = 128, share: str = "heads") -> SelectionSpec:
    return SelectionSpec(
        budget=budget,
        pooling="mass",
        stride=groups[0],
        key_stride=groups[1],
        block_k=block_k,
        sink_blocks=1,
        local_blocks=2,
        share=share,
    )


def attention_of(q: Any, k: Any, v: Any, spec: SelectionSpec) -> Attention:
    return Attention(q, k, v, CAUSAL, q.shape[-1] ** -0.5, spec.text())


def check(length: int, spec: SelectionSpec) -> str:
    """Scores against the definition, lists against the scores, attention with packed lists against the same apart."""
    q, k, v = inputs(length, 8, 2)
    attention = attention_of(q, k, v, spec)
    expected, possible = log_masses(attention), attention.candidates
    pairs = possible.expand(expected.shape)
    scores = torch.where(pairs, masses.Means(attention).scores(0, expected.shape[2]), -torch.inf)
    gap = float((scores - expected)[pairs & (expected > -60)].abs().max())
    lists, again = (attention.selection(*select(attention, "select")) for _ in range(2))
    lists.check(possible)
    ours = lists.dense(possible)
    wanted = tpd.tpd_select(expected, spec, None, 2).dense(possible)
    exact = tpd.tpd_select(scores, spec, None, 2).dense(possible)
    kernel = target.kernels(attention).attend
    out = target.attend(attention, lists, kernel)
    apart = target.attend(attention, replace(lists, indices=lists.lists.contiguous()), kernel)
    return (
        f"{length} {spec.stride}x{spec.key_stride} keys {spec.block_k} {spec.share}: scores within {gap:.4f},"
        f" {float((ours & wanted).sum() / wanted.sum()):.2%} of the definition's blocks, as the scores say"
        f" {torch.equal(exact, ours)}, twice alike {torch.equal(again.dense(possible), ours)}, density"
        f" {lists.density(possible):.4f}, packed as apart {torch.equal(out, apart)}"
    )


def whole(attend: Callable[[Any], Any], select_lists: Callable[[], Any]) -> Any:
    """Selection and attention."""
    return attend(select_lists())


def times(length: int, variants: bool) -> None:
    q, k, v = inputs(length)
    dense = milliseconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), 5)
    print(f"{length}: dense {dense:.2f} ms", flush=True)
    default = dict(masses.HOPPER)
    for groups, keys in (((4, 4), 128), ((4, 8), 128), ((8, 8), 128), ((8, 8), 64)):
        means = masses.Means(attention_of(q, k, v, spec_of(groups, block_k=keys)))
        rows = means.attention.blocks[0]
        for registers in (192, 200, 208) if variants and keys == 128 else (default["REGISTERS"],):
            masses.HOPPER = {**default, "REGISTERS": registers}
            one = milliseconds(functools.partial(means.scores, 0, rows))
            print(f"  {groups} keys {keys} masses {one:.3f} ms, {registers} registers", flush=True)
        masses.HOPPER = default
        duration = milliseconds(functools.partial(masses.Means, means.attention))
        print(f"  {groups} keys {keys} means {duration:.3f} ms", flush=True)
        for budget in (0.25, 0.125, 0.0625):
            attention = attention_of(q, k, v, spec_of(groups, budget, keys))
            kernel = target.kernels(attention).attend

            def choose(attention: Attention = attention) -> Any:
                return attention.selection(*select(attention, "select"))

            def attend(lists: Any, attention: Attention = attention, kernel: str = kernel) -> Any:
                return target.attend(attention, lists, kernel)

            lists = choose()
            alone, product = milliseconds(choose), milliseconds(functools.partial(attend, lists), 5)
            both = milliseconds(functools.partial(whole, attend, choose), 5)
            print(
                f"  {groups} keys {keys} budget {budget}: selection {alone:.3f}, attention {product:.2f}, both"
                f" {both:.2f} ms, {dense / both:.2f}x",
                flush=True,
            )
    text = SelectionSpec(budget=0.25, pooling="max", sink_blocks=1, local_blocks=2)
    attention = attention_of(q, k, v, text)
    print(f"  max pooling: selection {milliseconds(lambda: select(attention, 'select')):.3f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", default="131072,32768,8192")
    parser.add_argument("--variants", action="store_true")
    given = parser.parse_args()
    print(torch.cuda.get_device_name())
    for length in (4096, 4100):
        for groups, keys, share in (
            ((4, 4), 128, "heads"),
            ((8, 8), 128, "group"),
            ((4, 8), 64, "none"),
            ((4, 4), 64, "heads"),
        ):
            try:
                print(check(length, spec_of(groups, 0.25, keys, share)), flush=True)
            except Exception:
                traceback.print_exc(limit=-4)
    for length in map(int, given.lengths.split(",")):
        times(length, given.variants and length == 131072)


if __name__ == "__main__":
    main()
