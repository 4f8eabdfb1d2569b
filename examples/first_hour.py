"""The first hour with stem-compile in two minutes, on a small model with random weights: nothing is downloaded.

    python examples/first_hour.py            # writes into ./first-hour
    python examples/first_hour.py FOLDER

It does what a newcomer does: look at the environment, compile, explain, tune, check, and serve from four threads. Each
step is a few lines to copy; the shell commands work on a model of your own just so.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

import stem_compile

TARGET = "first_hour:decoder"
"""This file's function ``decoder``, for the command line."""
SERVED = 40
"""Requests that each thread sends."""


class Decoder(torch.nn.Module):
    """Two layers of causal attention over a vocabulary of 512 tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(128, 4, 256, batch_first=True, norm_first=True, dropout=0.0)
        self.embedding = torch.nn.Embedding(512, 128)
        self.layers = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = torch.nn.Linear(128, 512)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: int64 [batch, tokens]. Logits [batch, tokens, 512]."""
        mask = torch.nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        logits: torch.Tensor = self.head(self.layers(self.embedding(ids), mask=mask, is_causal=True))
        return logits


def decoder() -> torch.nn.Module:
    """What the command line calls for ``TARGET``."""
    torch.manual_seed(0)
    return Decoder().eval()


def shell(*arguments: str) -> int:
    """Run ``stem-compile`` where it finds this file, and show what it prints; its exit status."""
    print("\n$ stem-compile", *arguments, flush=True)
    command = [sys.executable, "-m", "stem_compile", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, flush=True)
    return done.returncode


def serve(options: dict[str, Any]) -> None:
    """Four threads call one compiled model with prompts of many lengths; every answer is that of one thread alone."""
    # Without min_length there is one graph for all lengths, which threads can share (docs/serve.md).
    fast = torch.compile(decoder(), backend="stem", options=options | {"min_length": 0}, dynamic=True)
    lengths = torch.randint(256, 3000, (4 * SERVED,)).tolist()
    prompts = [torch.randint(0, 512, (1, n)) for n in lengths]
    # Warm up before there are threads. The tensors are made like the prompts, outside inference mode: those made in it
    # are of another kind, for which Dynamo compiles anew.
    warm_up = [torch.zeros(1, n, dtype=torch.int64) for n in (300, 2900)]
    with torch.inference_mode():
        for prompt in warm_up:
            fast(prompt)
        alone = [fast(prompt)[0, -1] for prompt in prompts]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    answers: dict[int, torch.Tensor] = {}

    def work(first: int) -> None:
        with torch.inference_mode():  # a mode of its thread
            for i in range(first, len(prompts), 4):
                answers[i] = fast(prompts[i])[0, -1]

    start = time.perf_counter()
    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    for i, answer in enumerate(alone):
        torch.testing.assert_close(answers[i], answer)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "a graph was compiled while serving"
    print(
        f"served {len(prompts)} prompts from 4 threads in {seconds:.1f} s: one thread's answers, nothing compiled anew"
    )


def main() -> None:
    """All steps in order."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "first-hour").resolve()
    assert shell("env") == 0

    model, prompt = decoder(), torch.randint(0, 512, (1, 4096))
    with torch.inference_mode():
        fast = torch.compile(model, backend="stem", options={"budget": 0.5, "inner": "eager"})
        print("compiled:", tuple(fast(prompt).shape))
        print(stem_compile.explain(model, {"budget": 0.5})(prompt))

    assert shell("explain", TARGET, "--tokens", "2048", "-o", "budget=0.5") == 0
    tuning = ["--tokens", "2048", "--max-kl", "0.01", "--repeats", "1", "--out", str(folder)]
    options: dict[str, Any] = {"budget": 0.5}
    # Status 3: dense attention is the fastest within the bound, as may be for a model as small as this.
    if (status := shell("tune", TARGET, *tuning)) == 0:
        options = json.loads((folder / "options.json").read_text())
    assert status in (0, 3)
    flags = [f"--option={name}={value}" for name, value in options.items()]
    checks = ["-p", "dense-equivalence", "-p", "coverage", "--examples", "2"]
    assert shell("check", TARGET, *checks, *flags) == 0
    serve(options)


if __name__ == "__main__":
    main()
