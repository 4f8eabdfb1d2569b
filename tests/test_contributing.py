"""CONTRIBUTING.md: every example is cut out of the page and run as it stands there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.guide import PAGE, file_name, files, sections

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("title", sections())
def test_the_example_runs(title: str, tmp_path: Path) -> None:
    """In a process of its own, which is what a reader has."""
    for name, code in files().items():
        (tmp_path / name).write_text(code)
    run = [code for code in sections()[title] if file_name(code) is None]
    assert run, "nothing is run"
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "STEM_COMPILE_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", "\n".join(run)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{PAGE.name}, {title}:\n{done.stderr[-3000:]}"
