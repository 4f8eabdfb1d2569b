"""Rules of the structure, each with a test: imports flow one way, a new file is found by its name and documented,
nothing heavy is imported early."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Layers from bottom to top; a module may import its own layer and those below.
LAYERS = (
    ("algebra", "reasons", "registry", "timing", "packages"),
    ("selection", "distributed"),
    ("config", "ops"),
    ("kernels",),
    ("passes",),
    ("running",),
    ("backend",),
    ("explanation", "serving"),
    ("testing",),
    ("bench",),
    ("demo",),
    ("commands",),
    ("cli",),
    ("__main__",),
)


def modules() -> list[tuple[str, Path]]:
    """(layer, file) of every product module; a layer is a room of ``stem_compile`` or a module at its top."""
    top = [
        p
        for p in sorted((ROOT / "stem_compile").rglob("*.py"))
        if not {"passes", "kernels"} & set(p.relative_to(ROOT).parts)
    ]
    layers = [(p.relative_to(ROOT / "stem_compile").parts[0].removesuffix(".py"), p) for p in top]
    return layers + [(folder, p) for folder in ("passes", "kernels") for p in sorted((ROOT / folder).rglob("*.py"))]


def rank(layer: str) -> int:
    for index, names in enumerate(LAYERS):
        if layer in names:
            return index
    return -1


def imported(path: Path) -> set[str]:
    """Layers of stem_compile that a file imports, anywhere in it."""
    layers = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        layers |= {n.split(".")[1] for n in names if n.startswith("stem_compile.") and rank(n.split(".")[1]) >= 0}
    return layers


@pytest.mark.parametrize(("layer", "path"), modules(), ids=lambda x: x.name if isinstance(x, Path) else x)
def test_imports_flow_downwards(layer: str, path: Path) -> None:
    if layer == "__init__":
        return
    assert rank(layer) >= 0, f"{path} is in no layer: add it to LAYERS"
    wrong = {other for other in imported(path) if rank(other) > rank(layer)}
    assert not wrong, f"{path.relative_to(ROOT)} imports upwards: {wrong}"


@pytest.mark.parametrize("path", [p for _, p in modules()], ids=lambda p: p.name)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert path.stat().st_size == 0 or ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_operators_do_not_know_their_implementations() -> None:
    assert not {"kernels", "passes"} & imported(ROOT / "stem_compile/ops.py")


def test_private_torch_modules_are_imported_in_one_file_each() -> None:
    users: dict[str, set[str]] = {}
    for _, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module and module.startswith("torch._"):
                users.setdefault(module, set()).add(path.name)
    shared = {m: files for m, files in users.items() if len(files) > 1}
    assert not shared


def _loaded(code: str) -> set[str]:
    script = (
        f"import sys\n{code}\nprint(' '.join(m for m in ('triton', 'transformers', 'torch._dynamo', 'hypothesis',"
        " 'pytest', 'torch') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not _loaded("import stem_compile") & {"triton", "transformers", "torch._dynamo", "hypothesis", "pytest"}


def test_the_backend_is_found_without_an_import() -> None:
    assert "torch" in _loaded("import torch; torch.compile(torch.nn.Identity(), backend='stem')")


def test_the_backend_needs_no_transformers() -> None:
    assert "transformers" not in _loaded(
        "import torch; torch.compile(torch.nn.Linear(2, 2), backend='stem', options={'inner': 'eager'})(torch.ones(2))"
    )


def test_public_names_stay_callable_whatever_is_imported() -> None:
    script = (
        "import pkgutil, importlib, stem_compile\nimport stem_compile.explanation, stem_compile.config\nassert"
        " callable(stem_compile.explain)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_projects_own_environment_is_read_in_one_file() -> None:
    readers = {
        path.relative_to(ROOT).as_posix()
        for _, path in modules()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call | ast.Subscript)
        and "environ" in ast.unparse(node.func if isinstance(node, ast.Call) else node.value)
        and "STEM_COMPILE_" in ast.unparse(node)
    }
    assert readers == {"stem_compile/config.py"}
