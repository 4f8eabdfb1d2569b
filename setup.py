"""What pyproject.toml cannot say: the long description without links that only work beside the sources."""

from __future__ import annotations

import os
import re
from pathlib import Path

from setuptools import setup

HOME = os.environ.get("STEM_COMPILE_HOME_PAGE", "").rstrip("/")
"""Address under which README's relative links can be read, where there is one: they become absolute. Without one they
are stripped down to their text."""


def long_description() -> str:
    """README.md for a registry's page."""
    text = (Path(__file__).parent / "README.md").read_text()
    relative = r"\]\((?![a-z]+:|#)([^)\s]+)\)"
    if HOME:
        return re.sub(relative, rf"]({HOME}/\1)", text)
    text = re.sub(r"^!\[[^\]]*" + relative + r"\n+", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^\[\]]*)" + relative, r"\1", text)


setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    project_urls={"Paper": "https://arxiv.org/abs/2603.06274"} | ({"Home": HOME} if HOME else {}),
)
