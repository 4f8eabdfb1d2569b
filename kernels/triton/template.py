"""Kernel templates: the built-in ones are the files of ``templates/``; third parties add one by the entry point group
``stem_compile.templates`` or by ``TEMPLATES.register("name", TemplateFile(path))``, and launch it from a target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from stem_compile.registry import Registry


@runtime_checkable
class KernelTemplate(Protocol):
    """A Triton or Gluon module with a generated region (``codegen.py`` says what may stand there)."""

    def source(self) -> str:
        """Text of the module."""
        ...


@dataclass(frozen=True)
class TemplateFile:
    """A template that is a file, never imported as it is. path: of a Python module."""

    path: Path

    def source(self) -> str:
        """Text of the file."""
        return self.path.read_text()


FOLDER = Path(__file__).parent / "templates"

TEMPLATES: Registry[KernelTemplate] = Registry(
    "template",
    KernelTemplate,
    folder=FOLDER,
    package="stem_compile.kernels.triton.templates",
    group="stem_compile.templates",
    read=TemplateFile,
)
