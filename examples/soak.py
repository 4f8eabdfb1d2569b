"""1,000 calls of random lengths from 4 threads: memory stays flat, nothing compiles after the warm-up, and every answer
is that of one thread alone.

    python examples/soak.py                     # 1,000 calls
    python examples/soak.py --calls 10000
"""

from __future__ import annotations

import argparse
import gc
import threading
import time
from pathlib import Path

import torch
from first_hour import decoder

THREADS = 4
SHORTEST, LONGEST = 65, 1024
WARM_UP = (100, 1000)
OPTIONS = {"budget": 0.25, "min_length": 0, "block_size": 64, "key_block_size": 32}
"""No ``min_length`` and no prompt that fits in one block of 64, and so one graph for all lengths: Dynamo looks for the
graph of a call without a lock, and where there are two to choose from, threads can miss both and compile anew."""


def resident() -> float:
    """MiB of this process that are in memory now; NaN where the system does not say."""
    gc.collect()
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return float("nan")
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def graphs() -> int:
    """Graphs that Dynamo has compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def soak(calls: int) -> dict[str, float]:
    """Run it. "first", "last": MiB resident after a tenth and after all of the calls. "graphs": compiled after the
    warm-up; "different": answers that are not those of one thread; "seconds": of all calls."""
    fast = torch.compile(decoder(), backend="stem", options=OPTIONS, dynamic=True)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(SHORTEST, LONGEST, (calls,), generator=generator).tolist()
    prompts = [torch.randint(0, 512, (1, n), generator=generator) for n in lengths]
    # Made like the prompts: a tensor that is made in inference mode is of another kind, for which Dynamo compiles anew.
    warm_up = [torch.zeros(1, n, dtype=torch.int64) for n in WARM_UP]
    with torch.inference_mode():
        for prompt in warm_up:
            fast(prompt)
        alone = [fast(prompt)[0, -1] for prompt in prompts]
    before, done, lock, different, memory = graphs(), 0, threading.Lock(), 0, {0: resident()}

    def work(first: int) -> None:
        nonlocal done, different
        with torch.inference_mode():  # a mode of its thread
            for i in range(first, calls, THREADS):
                wrong = not torch.equal(fast(prompts[i])[0, -1], alone[i])
                with lock:
                    done, different = done + 1, different + wrong
                    if done % max(1, calls // 10) == 0:
                        memory[done] = resident()

    start = time.perf_counter()
    threads = [threading.Thread(target=work, args=(first,)) for first in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if done < calls:
        raise RuntimeError(f"a thread ended early: {done} of {calls} calls were answered")
    tenth = memory[max(1, calls // 10)]
    return {
        "first": tenth,
        "last": memory[max(memory)],
        "graphs": graphs() - before,
        "different": different,
        "seconds": seconds,
    }


def main() -> None:
    """Print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    arguments = parser.parse_args()
    stats = soak(arguments.calls)
    print(
        f"{arguments.calls} calls from {THREADS} threads in {stats['seconds']:.0f} s: {stats['first']:.0f} MiB resident"
        f" after a tenth, {stats['last']:.0f} MiB at the end, {stats['graphs']:.0f} graphs compiled after the warm-up,"
        f" {stats['different']:.0f} answers that are not one thread's"
    )


if __name__ == "__main__":
    main()
