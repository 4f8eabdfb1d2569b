"""Generated modules on disk: equal specs give byte-equal files, tracebacks and debuggers find readable source."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from stem_compile.kernels import codegen
from stem_compile.kernels.spec import KernelSpec


def directory() -> Path:
    """Where generated modules live: $STEM_COMPILE_CACHE, else ~/.cache/stem_compile."""
    return Path(os.environ.get("STEM_COMPILE_CACHE") or Path.home() / ".cache" / "stem_compile")


def write(source: str, stem: str) -> Path:
    """Store ``source`` under its content's hash. Atomic: a reader sees the whole file or none; racing writers write the same bytes."""
    folder = directory()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}_{hashlib.sha256(source.encode()).hexdigest()[:16]}.py"
    if not path.exists():
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
        with os.fdopen(handle, "w") as file:
            file.write(source)
        os.replace(temporary, path)
    return path


@functools.cache
def load(spec: KernelSpec) -> ModuleType:
    """The generated module of ``spec``, imported once a process."""
    path = write(codegen.generate(spec), spec.template)
    name = f"stem_compile_generated.{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    found.loader.exec_module(module)
    return module
