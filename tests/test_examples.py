"""The scripts in ``examples/`` do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str) -> str:
    """Standard output of a script in a process of its own."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=env, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_first_hour(tmp_path: Path) -> None:
    printed = run("examples/first_hour.py", str(tmp_path))
    for step in ("env", "explain", "tune", "check"):
        assert f"$ stem-compile {step}" in printed
    assert "2 attentions, 2 rewritten" in printed
    assert "PASS: 2 properties hold" in printed
    assert "served 160 prompts from 4 threads" in printed
    assert (tmp_path / "tune.html").exists()


@pytest.mark.slow
def test_a_thousand_calls_from_four_threads_are_one_threads() -> None:
    printed = run("examples/soak.py", "--calls", "1000")
    first, last = (int(n) for n in re.search(r"(\d+) MiB resident after a tenth, (\d+) MiB", printed).groups())  # type: ignore[union-attr]
    assert "0 graphs compiled after the warm-up, 0 answers that are not one thread's" in printed
    # Allocators keep arenas of their own for each thread; a leak of one prompt's activations would be 300 MiB.
    assert last - first < 48


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--balanced",)], ids=["zigzag", "balanced"])
def test_two_processes_compute_what_one_does(flags: tuple[str, ...]) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    printed = run(*torchrun, "examples/context_parallel.py", *flags, "--models", "llama", "gemma3")
    lines = [line for line in printed.splitlines() if line.endswith("of the blocks, all as in one process")]
    assert [line.split(":")[0] for line in lines] == ["llama", "llama, left padding", "gemma3", "gemma3, left padding"]
