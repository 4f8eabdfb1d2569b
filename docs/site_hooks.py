"""MkDocs hooks: pages that are not written by hand. README.md is the site's first page, CONTRIBUTING.md its page for
contributors, and the API reference lists every module, so that none is forgotten."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
COPY = ROOT / "out" / "docstrings"
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md"}
"""Page of the site -> file beside the sources. Their links are relative to the repository."""
ROOMS = {
    "users": ("What users touch", "stem_compile/*.py"),
    "algebra": ("Algebra", "stem_compile/algebra/**/*.py"),
    "selection": ("Selection", "stem_compile/selection/**/*.py"),
    "passes": ("Passes", "passes/**/*.py"),
    "kernels": ("Kernels", "kernels/**/*.py"),
    "serving": ("Serving", "stem_compile/serving/**/*.py"),
    "distributed": ("Several devices", "stem_compile/distributed/**/*.py"),
    "commands": ("Commands", "stem_compile/commands/**/*.py"),
    "bench": ("Measuring", "stem_compile/bench/**/*.py"),
    "demo": ("The demonstration", "stem_compile/demo/**/*.py"),
    "testing": ("Testing", "stem_compile/testing/**/*.py"),
}
"""Page of the API reference -> its title and the files whose docstrings it shows."""


def on_startup(*, command: str, dirty: bool) -> None:
    """Copy the package for the docstring reader, which follows no links and takes a folder for a package only where it
    has an ``__init__.py``."""
    shutil.rmtree(COPY, ignore_errors=True)
    shutil.copytree(ROOT / "stem_compile", COPY / "stem_compile", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (COPY / "stem_compile").rglob("*"):
        if folder.is_dir():
            (folder / "__init__.py").touch()


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside ``docs/`` and the API reference."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        for other, name in PAGES.items():
            text = text.replace(f"]({name}", f"]({other}")
        # Files beside the sources are no pages: their names stay, the links go.
        text = re.sub(r"\[([^\]]+)\]\((?!https?:|#)[^)]*\.(?:py|toml|txt)\)", r"\1", text)
        files.append(File.generated(config, page, content=text))
    for room, (title, pattern) in ROOMS.items():
        entries = "\n\n".join(f"::: {module}" for module in modules(pattern))
        files.append(File.generated(config, f"api/{room}.md", content=f"# {title}\n\n{entries}\n"))
    return files


def modules(pattern: str) -> list[str]:
    """Importable names of the documented modules under a glob pattern; kernel templates are no modules of the API."""
    paths = [p.relative_to(ROOT) for p in sorted(ROOT.glob(pattern)) if "templates" not in p.parts]
    names = []
    for path in paths:
        if ast.get_docstring(ast.parse((ROOT / path).read_text())):
            parts = path.with_suffix("").parts
            parts = parts if parts[0] == "stem_compile" else ("stem_compile", *parts)
            names.append(".".join(parts).removesuffix(".__init__"))
    return names
