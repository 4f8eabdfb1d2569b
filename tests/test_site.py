"""The documentation site: every page is in its navigation, every module in its API reference, every entry of the
glossary in order. `make docs` builds it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOOKS = (ROOT / "docs" / "site_hooks.py").read_text()
NAVIGATION = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))


def test_every_page_is_in_the_navigation() -> None:
    written = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    generated = {page for page in NAVIGATION if page.startswith("api/")} | {"index.md", "contributing.md"}
    assert written | generated == NAVIGATION


def test_every_module_is_in_the_api_reference() -> None:
    patterns = re.findall(r'", "([\w/*]+\.py)"\)', HOOKS)
    assert len(patterns) == len([page for page in NAVIGATION if page.startswith("api/")])
    shown = {path for pattern in patterns for path in ROOT.glob(pattern)}
    rooms = ("stem_compile", "passes", "kernels")
    listed = subprocess.run(["git", "ls-files", *rooms], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = {ROOT / name for name in listed.stdout.split() if name.endswith(".py")}
    assert not {str(p.relative_to(ROOT)) for p in modules - shown if p.name != "__init__.py"}


def test_the_glossary_is_in_order() -> None:
    words = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)[2:]
    assert words == sorted(words, key=str.lower)
    assert len(words) == len(set(words)) > 40
