"""Time to first token in vLLM, native and with the stem plugin, the two in turns in one run; the pass key asked for.

    python tools/save_smollm.py out/smollm2
    python benchmarks/serving.py out/smollm2 --tokens 2048 4096 8176 --budget 0.25 --chunks 2048 8192

Needs an environment with vLLM (`make vllm` builds one). Each engine is a process of its own with its own cache of keys;
no prompt of a measurement shares a block with an earlier one, and the prefix cache is on. One prompt at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

from stem_compile.bench.passkey import prompt


def engine(model: str, dtype: str, longest: int, chunk: int, options: dict[str, Any] | None) -> Any:
    """A vLLM engine; without ``options`` the native one."""
    from vllm import LLM

    return LLM(
        model,
        dtype=dtype,
        enforce_eager=True,
        max_model_len=longest,
        max_num_batched_tokens=chunk,
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        additional_config={} if options is None else {"stem": options},
    )


def first_token(llm: Any, ids: list[int]) -> float:
    """Seconds until the first token of a prompt."""
    from vllm import SamplingParams

    start = time.perf_counter()
    llm.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
    return time.perf_counter() - start


def answer(llm: Any, ids: list[int], tokens: int) -> list[int]:
    """Greedy tokens after a prompt, whose prefill the prefix cache may hold."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    out = llm.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)
    return list(out[0].outputs[0].token_ids)


def measure(engines: dict[str, Any], tokens: int, rounds: int) -> dict[str, Any]:
    """Median seconds to the first token and answered pass keys of each engine, which take turns."""
    tokenizer = next(iter(engines.values())).get_tokenizer()
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    keys = dict.fromkeys(engines, 0)
    for number in range(rounds):
        asked = prompt(tokenizer, tokens - 1, position=(number + 1) / (rounds + 1))
        # A first token of its own, so that no block of a prompt lies in the prefix cache.
        ids = [100 + 7 * number + tokens % 7, *asked.ids]
        for name in list(engines)[:: 1 if number % 2 else -1]:
            seconds[name].append(first_token(engines[name], ids))
            keys[name] += answer(engines[name], ids, len(asked.answer)) == asked.answer
    return {
        "tokens": tokens,
        "seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "all": seconds,
        "pass_keys": keys,
        "rounds": rounds,
    }


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a chunk size and length."""
    from stem_compile.serving.vllm import metrics

    options = {"budget": arguments.budget} | json.loads(arguments.options)
    rows = []
    for chunk in arguments.chunks:
        longest = max(arguments.tokens) + 16
        engines = {
            "native": engine(arguments.model, arguments.dtype, longest, chunk, None),
            "stem": engine(arguments.model, arguments.dtype, longest, chunk, options),
        }
        for llm in engines.values():
            first_token(llm, list(range(200, 200 + min(arguments.tokens))))
        for tokens in arguments.tokens:
            metrics(engines["stem"], clear=True)
            row = measure(engines, tokens, arguments.rounds)
            row |= {"chunk": chunk, "options": options, "metrics": metrics(engines["stem"])}
            rows.append(row)
            native, stem = row["seconds"]["native"], row["seconds"]["stem"]
            print(
                f"chunks of {chunk}, {tokens} tokens: native {native:.2f} s, stem {stem:.2f} s, {native / stem:.2f}x,"
                f" pass keys native {row['pass_keys']['native']} stem {row['pass_keys']['stem']} of {arguments.rounds},"
                f" {row['metrics']}",
                flush=True,
            )
        del engines
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the model")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8176])
    parser.add_argument("--chunks", type=int, nargs="+", default=[8192], help="most tokens of a step")
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--options", default="{}", help='more options, such as \'{"pooling": "max"}\'')
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    rows = run(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
