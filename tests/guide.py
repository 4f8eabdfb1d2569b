"""CONTRIBUTING.md as code: its examples, by the section they stand in."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def sections() -> dict[str, list[str]]:
    """Title of each "To add ..." -> its Python examples."""
    parts = re.split(r"^### (To add .*)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return {
        title: re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        for title, text in zip(parts[::2], parts[1::2], strict=True)
    }


def file_name(code: str) -> str | None:
    """Name of the file that an example is, from its first line; None for one that is run."""
    head = re.match(r"# (\w+\.py)\n", code)
    return None if head is None else head[1]


def files() -> dict[str, str]:
    """Name -> content of every example that is a file."""
    return {name: code for codes in sections().values() for code in codes if (name := file_name(code))}
