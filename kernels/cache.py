"""Generated modules on disk: equal specs give byte-equal files, tracebacks and debuggers find readable source. Measured
choices lie beside them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from stem_compile.config import cache_folder
from stem_compile.kernels.spec import KernelSpec
from stem_compile.kernels.triton import codegen
from stem_compile.kernels.triton.template import TEMPLATES
from stem_compile.selection.policies import POLICIES


def directory() -> Path:
    """Where generated modules live: $STEM_COMPILE_CACHE, else ~/.cache/stem_compile."""
    return cache_folder()


def write(source: str, stem: str) -> Path:
    """Store ``source`` under its content's hash. Atomic: a reader sees the whole file or none; racing writers write the
    same bytes."""
    path = directory() / f"{stem}_{_hash(source)}.py"
    if not path.exists():
        _replace(path, source)
    return path


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(temporary, path)


def templates() -> str:
    """Hash of all templates: measured choices are kept separately for each set of templates."""
    return _hash("".join(template.source() for _, template in TEMPLATES.members()))


def recall(kind: str, key: str) -> Any:
    """What ``store`` kept under ``key``; None where nothing is, or nothing readable."""
    try:
        kept = json.loads((directory() / f"{kind}_{_hash(key)}.json").read_text())
        return kept["value"] if kept["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def store(kind: str, key: str, value: Any) -> None:
    """Keep ``value`` (JSON) for later processes; where the folder cannot be written, they measure again."""
    with contextlib.suppress(OSError):
        _replace(directory() / f"{kind}_{_hash(key)}.json", json.dumps({"key": key, "value": value}, indent=1))


@TEMPLATES.caches
@POLICIES.caches
@functools.cache
def load(kernel_spec: KernelSpec) -> ModuleType:
    """The generated module of ``kernel_spec``, imported once a process."""
    path = write(codegen.generate(kernel_spec), kernel_spec.template)
    name = f"stem_compile_generated.{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    file = importlib.util.spec_from_file_location(name, path)
    assert file is not None and file.loader is not None
    module = importlib.util.module_from_spec(file)
    sys.modules[name] = module
    file.loader.exec_module(module)
    return module
