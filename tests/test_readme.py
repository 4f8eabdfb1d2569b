"""README as a reader meets it: every block runs as written, offline, and prints what stands there."""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stem_compile.config import StemConfig
from stem_compile.selection.density import causal_density, kept_from

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WRITE = os.environ.get("STEM_COMPILE_WRITE_DOCS")


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(README.read_text()) if kind == language]


@functools.cache
def hub(folder: Path) -> dict[str, str]:
    """Environment in which ``MODEL`` lies in the local cache of transformers: a tiny model under its name."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    home = folder / f"hub/models--{MODEL.replace('/', '--')}"
    snapshot = home / "snapshots" / "0"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, intermediate_size=64, vocab_size=300, max_position_embeddings=8192)
    transformers.LlamaForCausalLM(config).save_pretrained(snapshot)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "long": 1, "text": 2, "?": 3}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(snapshot)
    return {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}


def run(command: list[str], cwd: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(cwd)])
    env = os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "0"} | (environment or {})
    env.pop("COLUMNS", None)  # no terminal: pytest-xdist tells its workers the width of theirs
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=600)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return hub(tmp_path_factory.mktemp("home"))


def test_every_block_is_of_a_kind_that_is_run() -> None:
    assert {kind for kind, _ in BLOCK.findall(README.read_text())} == {"python", "bash", "text"}
    assert len(blocks("python")) == 3
    assert len(blocks("text")) == 1


def test_the_quickstart_prints_what_stands_there(tmp_path: Path) -> None:
    quickstart, (shown,) = blocks("python")[0], blocks("text")
    done = run([sys.executable, "-W", "error::UserWarning", "-c", quickstart], tmp_path)
    assert done.returncode == 0, done.stderr
    if WRITE:
        README.write_text(README.read_text().replace(shown, done.stdout))
        shown = done.stdout
    assert done.stdout == shown
    assert len([line for line in quickstart.splitlines() if line.strip()]) <= 18


def test_the_model_of_transformers_generates(tmp_path: Path, cache: dict[str, str]) -> None:
    done = run([sys.executable, "-c", blocks("python")[1]], tmp_path, cache)
    assert done.returncode == 0, done.stderr


def test_the_unit_test_passes(tmp_path: Path) -> None:
    (tmp_path / "my_project.py").write_text("from tests.testing.models import plain as my_model\n")
    (tmp_path / "test_mine.py").write_text(blocks("python")[2])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", "test_mine.py"]
    done = run(command, tmp_path)
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def commands() -> list[str]:
    return [line.partition("#")[0].strip() for block in blocks("bash") for line in block.splitlines() if line]


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("stem-compile")])
def test_commands_run_as_written(command: str, tmp_path: Path, cache: dict[str, str]) -> None:
    program, *arguments = shlex.split(command)
    done = run([sys.executable, "-m", program.replace("-", "_"), *arguments], tmp_path, cache)
    assert done.returncode == 0, done.stdout + done.stderr
    assert MODEL in done.stdout or "attentions" in done.stdout or "PASS" in done.stdout


def test_other_commands_are_known() -> None:
    others = [c for c in commands() if not c.startswith("stem-compile")]
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for command in others:
        program, what = command.split()[:2]
        assert (program == "make" and what in targets) or command == "pip install .", command


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", README.read_text())
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def density_table() -> str:
    lengths = (2048, 4096, 8192, 16384, 32768, 131072)
    head = "| `budget` | " + " | ".join(f"{n:,}" for n in lengths) + " | kept within a tenth from |"
    lines = [head, "|---" * (len(lengths) + 2) + "|"]
    for budget in (0.5, 0.25, 0.125, 0.0625):
        spec = StemConfig(budget=budget).selection
        shares = " | ".join(f"{causal_density(spec, n):.0%}" for n in lengths)
        lines.append(f"| {budget} | {shares} | {kept_from(spec):,} tokens |")
    return "\n".join(lines)


def test_the_table_of_densities_is_what_is_computed() -> None:
    table, text = density_table(), README.read_text()
    if WRITE:
        README.write_text(re.sub(r"\| `budget` \| 2,048 .*?(?=\n\n)|^DENSITIES$", table, text, flags=re.S | re.M))
    assert table in README.read_text()
