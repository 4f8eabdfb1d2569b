"""The test that README.md tells a user to add to CI, executed as it is written there, and what docs/testing.md says of
it."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from stem_compile.testing import properties
from tests.testing.models import Plain

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "testing.md").read_text()


def blocks(text: str) -> list[str]:
    """Python code of a Markdown text that has to do with the toolkit."""
    return [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "stem_compile.testing" in code]


def my_model() -> torch.nn.Module:
    """What the README's reader has: here a small one."""
    torch.manual_seed(0)
    return Plain(heads=2).eval()


def test_the_readmes_test_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks((ROOT / "README.md").read_text())
    assert 'check_model(my_model(), options={"budget": 0.25}).raise_for_failures()' in code
    assert blocks(TEXT) == [code]
    project = types.ModuleType("my_project")
    project.my_model = my_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "my_project", project)
    space: dict[str, Any] = {}
    exec(code, space)
    space["test_stem"]()


def test_every_property_is_explained() -> None:
    assert re.findall(r"^\| ([a-z-]+) \| (?!holds)", TEXT, re.MULTILINE)[: len(properties.names())] == list(
        properties.names()
    )
