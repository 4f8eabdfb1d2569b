"""The test suite under every supported version of torch, each in an environment of its own: ``make versions``.

``make versions ONLY=2.15`` runs one of them, ``TESTS="tests/passes tests/testing"`` a part of the suite. Each run
replaces its row of docs/versions.md. pip's own configuration decides where packages come from.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
import venv
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "versions.md"
FOLDER = ROOT / ".versions"
SUPPORTED = {"2.11": "5.17", "2.12": "5.19", "2.13": "5.23", "2.14": "5.23", "2.15": "5.24"}
"""torch -> transformers, the oldest with the oldest and the newest with the newest. triton is torch's own."""
PACKAGES = (
    "hypothesis",
    "pytest",
    "pytest-xdist",
    "matplotlib",
    "jinja2",
    "gguf",
    "accelerate",
    "setuptools>=77",
    "triton",
)
TESTS = ("tests",)
COLUMNS = ("torch", "triton", "transformers", "Python", "tests", "passed", "failed", "skipped", "date")
HEAD = f"""# Versions

Supported: torch {next(iter(SUPPORTED))} to {list(SUPPORTED)[-1]}, each with its own triton, and transformers
{next(iter(SUPPORTED.values()))} to {list(SUPPORTED.values())[-1]}. `make versions` builds one environment each and runs
the test suite; `make versions ONLY=2.15` one of them, `TESTS="tests/passes"` a part. A row says what was run last, and
"not run" where nothing was, on this page's machine.

"""


@dataclass(frozen=True)
class Environment:
    """One virtual environment. torch, transformers: versions as "major.minor"."""

    torch: str
    transformers: str

    @property
    def folder(self) -> Path:
        return FOLDER / f"torch-{self.torch}"

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def built(self) -> None:
        """Install what is not there yet, this project last. Raises CalledProcessError."""
        if not self.python.exists():
            venv.create(self.folder, with_pip=True)
        pinned = [f"torch=={self.torch}.*", f"transformers=={self.transformers}.*"]
        self._pip(*pinned, *PACKAGES)
        self._pip("--no-deps", "--no-build-isolation", "-e", str(ROOT))

    def _pip(self, *words: str) -> None:
        command = [str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words]
        subprocess.run(command, check=True, cwd=ROOT)

    def tested(self, tests: list[str]) -> dict[str, str]:
        """A row of the table."""
        report = self.folder / "report.xml"
        report.unlink(missing_ok=True)
        command = [str(self.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
        versions = self._versions()
        return (
            versions
            | counts(report)
            | {
                "tests": "all" if tuple(tests) == TESTS else ", ".join(t.removeprefix("tests/") for t in tests),
                "date": datetime.date.today().isoformat(),
            }
        )

    def _versions(self) -> dict[str, str]:
        code = (
            "import importlib.metadata as m, platform; print(*(m.version(n) for n in ('torch', 'triton',"
            " 'transformers')), platform.python_version())"
        )
        said = subprocess.run([str(self.python), "-c", code], capture_output=True, text=True, check=True).stdout.split()
        return dict(zip(("torch", "triton", "transformers", "Python"), said, strict=True))


def counts(report: Path) -> dict[str, str]:
    """passed, failed and skipped of pytest's XML; nothing passed where there is none."""
    if not report.exists():
        return {"passed": "0", "failed": "the run itself", "skipped": "0"}
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    number = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = number["failures"] + number["errors"]
    passed = number["tests"] - failed - number["skipped"]
    return {"passed": str(passed), "failed": str(failed), "skipped": str(number["skipped"])}


def rows(text: str) -> dict[str, dict[str, str]]:
    """The table's rows by torch's "major.minor"."""
    versions = {}
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip().strip("|").split("|")]
        if len(cells) == len(COLUMNS) and re.match(r"\d+\.\d+", cells[0]):
            versions[".".join(cells[0].split(".")[:2])] = dict(zip(COLUMNS, cells, strict=True))
    return versions


def page(known: dict[str, dict[str, str]]) -> str:
    """docs/versions.md."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
    for torch, transformers in SUPPORTED.items():
        empty = dict.fromkeys(COLUMNS, "-") | {"torch": torch, "transformers": transformers, "tests": "not run"}
        row = known.get(torch, empty)
        lines.append(f"| {' | '.join(row[c] for c in COLUMNS)} |")
    return HEAD + "\n".join(lines) + "\n\n" + CACHES


CACHES = """## Caches between processes

| cache | state |
|---|---|
| Inductor's and AOTAutograd's caches, the next process | hit, same numbers |
| `torch.compiler.save_cache_artifacts`, loaded into another folder or on another machine | hit, same numbers |
| `aot_compile`, saved and loaded in another process | same numbers, after `import stem_compile.backend` |

Each row is a test of `tests/test_caches.py`.
"""


def main() -> int:
    """Build, run, write. Status 1 when a test failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=list(SUPPORTED), metavar="TORCH", help="one version of torch"
    )
    parser.add_argument("tests", nargs="*", default=list(TESTS), help="paths for pytest (default: all)")
    arguments = parser.parse_args()
    bad = False
    for torch in arguments.only or SUPPORTED:
        environment = Environment(torch, SUPPORTED[torch])
        print(f"torch {torch}, transformers {environment.transformers}, Python {platform.python_version()}", flush=True)
        environment.built()
        row = environment.tested(arguments.tests)
        known = rows(PAGE.read_text()) if PAGE.exists() else {}
        PAGE.write_text(page(known | {torch: row}))
        bad |= row["failed"] != "0"
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
