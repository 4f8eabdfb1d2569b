"""The wheel holds every folder of the package."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_folder_with_modules_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    walked = os.walk(ROOT / "stem_compile", followlinks=True)
    folders = [Path(folder) for folder, _, files in walked if any(name.endswith(".py") for name in files)]
    assert {".".join(folder.relative_to(ROOT).parts) for folder in folders} <= set(listed)
