"""CONTRIBUTING.md: every example is cut out of the page and run as it stands there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stem_compile.passes.match import PATTERNS
from stem_compile.registry import Registry
from stem_compile.selection.policies import POLICIES
from tests.guide import PAGE, file_name, sections

REGISTRIES: tuple[Registry, ...] = (PATTERNS, POLICIES)


@pytest.fixture(autouse=True)
def _nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files of the examples can be imported; afterwards they and what they registered are gone."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = [set(registry.registered()) for registry in REGISTRIES]
    modules = set(sys.modules)
    yield
    for registry, names in zip(REGISTRIES, before, strict=True):
        for name in set(registry.registered()) - names:
            registry.unregister(name)
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("title", sections())
def test_the_example_runs(title: str, tmp_path: Path) -> None:
    examples = sections()[title]
    assert any(file_name(code) is None for code in examples), "nothing is run"
    for code in examples:
        if name := file_name(code):
            (tmp_path / name).write_text(code)
        else:
            exec(compile(code, f"{PAGE.name}: {title}", "exec"), {"__name__": "example"})
