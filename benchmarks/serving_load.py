"""Requests of random lengths with random aborts through vLLM with the stem plugin: none lost, none wrong, memory flat.

    python benchmarks/serving_load.py --requests 1000

The model is a small Llama with random weights. Each request gets a random prompt and is aborted with a probability,
some while they wait, some in the middle of their prefill, some while they decode. At budget 1.0 the greedy tokens of a
sample of the others are compared with a native engine's. Prints one line and exits with 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VOCABULARY = 512
LONGEST = 1536


def save_model(folder: Path) -> None:
    """A Llama of 2 layers whose weights are large enough for attention to matter."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=VOCABULARY, max_position_embeddings=2048, head_dim=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    model.save_pretrained(folder)


def engine(folder: Path, options: dict[str, Any] | None, chunk: int) -> Any:
    """A vLLM engine that takes tokens; without ``options`` the native one."""
    from vllm import LLM

    return LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        max_num_batched_tokens=chunk,
        max_num_seqs=32,
        enable_prefix_caching=True,
        additional_config={} if options is None else {"stem": options},
    )


def prompts(count: int, seed: int) -> Iterator[list[int]]:
    """Random prompts of 1 to ``LONGEST`` tokens, a third of them with a beginning that others share."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, VOCABULARY) for _ in range(512)]
    for _ in range(count):
        length = min(int(rng.lognormvariate(5.2, 1.2)) + 1, LONGEST)
        ids = [rng.randrange(3, VOCABULARY) for _ in range(length)]
        if rng.random() < 1 / 3:
            ids[: len(shared)] = shared[:length]
        yield ids


@dataclass
class Outcome:
    """What became of the requests. tokens: of the finished ones, by number. memory: MiB resident of the engine's
    processes, at tenths of the requests."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    aborted: set[int] = field(default_factory=set)
    memory: list[int] = field(default_factory=list)


def resident(process: Any) -> int:
    """MiB of a process's descendants, the engine's."""
    return int(sum(child.memory_info().rss for child in process.children(recursive=True)) / 2**20)


def drive(llm: Any, requests: list[list[int]], abort: float, seed: int) -> Outcome:
    """Send the requests, 24 at a time, abort some at random moments, and collect what comes back."""
    import psutil
    from vllm import SamplingParams

    rng, outcome, process = random.Random(seed), Outcome(), psutil.Process()
    sampling = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, detokenize=False)
    waiting, running = list(enumerate(requests))[::-1], dict[str, int]()
    core = llm.llm_engine
    while waiting or running:
        while waiting and len(running) < 24:
            number, ids = waiting.pop()
            core.add_request(f"r{number}", {"prompt_token_ids": ids}, sampling)
            running[f"r{number}"] = number
            if number % max(1, len(requests) // 10) == 0:
                outcome.memory.append(resident(process))
        for result in core.step():
            if result.finished and result.request_id in running:
                outcome.tokens[running.pop(result.request_id)] = list(result.outputs[0].token_ids)
        for name in [n for n in running if rng.random() < abort]:
            core.abort_request([name])
            outcome.aborted.add(running.pop(name))
    outcome.memory.append(resident(process))
    return outcome


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--sample", type=int, default=100, help="requests that a native engine answers too")
    parser.add_argument("--abort", type=float, default=0.03, help="probability, each step, of each running request")
    parser.add_argument("--chunk", type=int, default=768, help="most tokens of a step")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from stem_compile.serving.vllm import metrics

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_model(folder)
        requests = list(prompts(arguments.requests, arguments.seed))
        llm = engine(folder, {"budget": 1.0, "min_length": 256}, arguments.chunk)
        outcome = drive(llm, requests, arguments.abort, arguments.seed)
        counted = metrics(llm)
        del llm
        sample = random.Random(1).sample(sorted(outcome.tokens), min(arguments.sample, len(outcome.tokens)))
        native = drive(engine(folder, None, arguments.chunk), [requests[n] for n in sample], 0.0, 0)
    wrong = [number for place, number in enumerate(sample) if native.tokens[place] != outcome.tokens[number]]
    lost = arguments.requests - len(outcome.tokens) - len(outcome.aborted)
    print(
        f"{arguments.requests} requests: {len(outcome.tokens)} finished, {len(outcome.aborted)} aborted, {lost} lost;"
        f" {len(wrong)} of {len(sample)} sampled differ from native; resident MiB {outcome.memory}; {counted}"
    )
    sys.exit(bool(wrong or lost))


if __name__ == "__main__":
    main()
