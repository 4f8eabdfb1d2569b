"""What ``make versions`` writes: one row a version of torch, kept by later runs, and what the package metadata says."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
XML = '<testsuites><testsuite tests="9" failures="1" errors="1" skipped="2"/></testsuites>'


@pytest.fixture(scope="module")
def versions() -> ModuleType:
    spec = importlib.util.spec_from_file_location("versions", ROOT / "tools" / "versions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["versions"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_its_rows_give(versions: ModuleType) -> None:
    written = (ROOT / "docs" / "versions.md").read_text()
    assert versions.page(versions.rows(written)) == written
    assert list(versions.rows(written)) == list(versions.SUPPORTED)


def test_a_run_replaces_its_own_row(versions: ModuleType) -> None:
    row = dict.fromkeys(versions.COLUMNS, "x") | {"torch": "2.12.1"}
    known = versions.rows(
        versions.page({"2.12": row, "2.15": dict.fromkeys(versions.COLUMNS, "y") | {"torch": "2.15.0"}})
    )
    assert known["2.12"] == row
    assert known["2.15"]["passed"] == "y"
    assert known["2.11"]["tests"] == "not run"


def test_counts_are_those_of_the_report(versions: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "report.xml"
    file.write_text(XML)
    assert versions.counts(file) == {"passed": "5", "failed": "2", "skipped": "2"}
    assert versions.counts(tmp_path / "none.xml")["failed"] != "0"


def test_the_metadata_says_what_is_supported(versions: ModuleType) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch, transformers = next(iter(versions.SUPPORTED.items()))
    assert f"torch>={torch}" in project["dependencies"]
    assert f"transformers>={transformers}" in project["optional-dependencies"]["models"]
