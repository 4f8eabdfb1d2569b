"""The test that README.md tells a user to add to CI, executed as it is written there, and what docs/testing.md says of
it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

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


def test_the_readmes_test_passes() -> None:
    (code,) = blocks((ROOT / "README.md").read_text())
    assert 'check_model(my_model(), options={"budget": 0.25}).raise_for_failures()' in code
    assert len([line for line in code.splitlines() if line.strip()]) == 3
    assert blocks(TEXT) == [code]
    space: dict[str, Any] = {"my_model": my_model}
    exec(code, space)
    space["test_stem"]()


def test_every_property_is_explained() -> None:
    assert re.findall(r"^\| ([a-z-]+) \| (?!holds)", TEXT, re.MULTILINE)[: len(properties.names())] == list(
        properties.names()
    )
