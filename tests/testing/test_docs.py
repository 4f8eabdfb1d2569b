"""The test that docs/testing.md tells a user to add to CI, executed as it is written there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from stem_compile.testing import properties
from tests.testing.models import plain

TEXT = (Path(__file__).parents[2] / "docs" / "testing.md").read_text()


def test_the_documented_test_passes() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert 'check_model(my_model(), options={"budget": 0.25}).raise_for_failures()' in code
    space: dict[str, Any] = {"my_model": plain}
    exec(code, space)
    space["test_stem"]()


def test_every_property_is_explained() -> None:
    assert re.findall(r"^\| ([a-z-]+) \| (?!holds)", TEXT, re.MULTILINE)[: len(properties.names())] == list(properties.names())
