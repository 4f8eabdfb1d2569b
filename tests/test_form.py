"""The form of the sources: lines, function lengths, docstrings, names, and nothing in them of the machine they were
written on."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COLUMNS = 120
LINES = 60
"""Of one function, outside the kernel templates, whose bodies are one program each."""
HOW_NOT_WHAT = {"found", "made", "chosen", "lit", "seen"}
"""Names that say how a value came about and not what it is; nothing is called so, whether public or local."""
MACHINE = re.compile(r"(?<![\w.])/(work|root|farm|tmp/w)/|artifactory|--(extra-)?index-url|trusted-host|proxy\.local")
"""Paths and hosts of one machine."""
CONTRACTS = (
    "stem_compile/registry.py",
    "stem_compile/selection/policy.py",
    "stem_compile/selection/attention.py",
    "passes/match.py",
    "kernels/contract.py",
    "kernels/triton/template.py",
)
"""Files that say what a member of a registry is."""


def tracked() -> list[Path]:
    """Files of the repository; without git, those that git would have."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return [
            p for folder in ("stem_compile", "passes", "kernels", "tests", "docs") for p in (ROOT / folder).rglob("*.*")
        ]
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def sources() -> list[Path]:
    """Python files, each once: ``stem_compile/passes`` and ``stem_compile/kernels`` are links."""
    return [p for p in tracked() if p.suffix == ".py"]


def product() -> list[Path]:
    """Python files that are installed, without the kernel templates."""
    rooms = ("stem_compile", "passes", "kernels")
    return [p for p in sources() if p.relative_to(ROOT).parts[0] in rooms and "templates" not in p.parts]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources(), ids=name)
def test_lines_fit(path: Path) -> None:
    # A pragma at the end does not count, as in ruff's E501.
    lines = (re.sub(r"  # (type: ignore|noqa).*", "", line) for line in path.read_text().splitlines())
    long = [n for n, line in enumerate(lines, 1) if len(line) > COLUMNS]
    assert not long, f"{name(path)}: lines {long} are over {COLUMNS} columns"


@pytest.mark.parametrize("path", [p for p in sources() if "templates" not in p.parts], ids=name)
def test_functions_are_short(path: Path) -> None:
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    long = {f.name: size for f in functions if (size := (f.end_lineno or 0) - f.lineno + 1) > LINES}
    assert not long, f"{name(path)}: {long}, at most {LINES} lines a function"


def identifiers(path: Path) -> Iterator[tuple[int, str]]:
    """(line, name): whatever a file gives a name to: variables, parameters, attributes, functions and classes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.alias | ast.ExceptHandler):
            yield node.lineno, getattr(node, "asname", None) or node.name or ""


@pytest.mark.parametrize("path", sources(), ids=name)
def test_names_say_what_a_value_is(path: Path) -> None:
    bad = [(line, word) for line, word in identifiers(path) if word.strip("_").lower() in HOW_NOT_WHAT]
    assert not bad, f"{name(path)}: {bad}"


def undocumented(module: object) -> Iterator[str]:
    """Public functions, classes and methods of a module without a docstring of their own or of what they override."""
    for label, member in vars(module).items():
        home = getattr(member, "__module__", None)
        if (
            label.startswith("_")
            or home != module.__name__
            or not (inspect.isfunction(member) or inspect.isclass(member))
        ):  # type: ignore[attr-defined]
            continue
        if not inspect.getdoc(member):
            yield label
        if inspect.isclass(member):
            own = {k: v for k, v in vars(member).items() if not k.startswith("_")}
            yield from (
                f"{label}.{k}"
                for k, v in own.items()
                if (inspect.isfunction(v) or isinstance(v, property | classmethod | staticmethod))
                and not inspect.getdoc(getattr(member, k))
            )


@pytest.mark.parametrize("path", product(), ids=name)
def test_public_names_are_documented(path: Path) -> None:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[: -1 if parts[-1] == "__init__" else None]
    module = ".".join(parts if parts[0] == "stem_compile" else ("stem_compile", *parts))
    if module == "stem_compile.testing.plugin":
        pytest.importorskip("hypothesis")
    if module == "stem_compile.serving.vllm":
        pytest.importorskip("vllm")
    bare = set(undocumented(importlib.import_module(module)))
    assert not bare, f"{module}: {sorted(bare)} have no docstring"


def annotations(node: ast.AST) -> Iterator[ast.expr | None]:
    """Types that a public function, method or field of a class is annotated with."""
    if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        yield from (argument.annotation for argument in every if argument is not None)
        yield node.returns
    elif isinstance(node, ast.ClassDef):
        fields = (member for member in node.body if isinstance(member, ast.AnnAssign))
        yield from (f.annotation for f in fields if isinstance(f.target, ast.Name) and not f.target.id.startswith("_"))


@pytest.mark.parametrize("path", CONTRACTS)
def test_contracts_name_their_types(path: str) -> None:
    """No bare ``Any`` in the public signatures and fields of a contract."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        bare = [a.lineno for a in annotations(node) if isinstance(a, ast.Name) and a.id == "Any"]
        assert not bare, f"{path}: {getattr(node, 'name', '')}, lines {bare}"


@pytest.mark.parametrize("path", [p for p in sources() if p.relative_to(ROOT).parts[0] != "stem_compile"], ids=name)
def test_no_tolerance_is_written_by_hand(path: Path) -> None:
    """``stem_compile.testing.tolerances`` has one row for each kind of comparison."""
    calls = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
    by_hand = [
        call.lineno
        for call in calls
        for keyword in call.keywords
        if keyword.arg in ("rtol", "atol") and isinstance(keyword.value, ast.Constant) and keyword.value.value != 0
    ]
    assert not by_hand, f"{name(path)}: a tolerance in lines {by_hand}"


def test_nothing_of_the_machine_is_tracked() -> None:
    texts = [p for p in tracked() if p.suffix not in (".png", ".gz") and p != Path(__file__)]
    bad = {name(p): hit.group() for p in texts if (hit := MACHINE.search(p.read_text(errors="ignore")))}
    assert not bad
