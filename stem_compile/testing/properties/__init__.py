"""The properties, one file each, found by name. A property module has

``NAME, TITLE, ORDER``            its name in options and reports, what holds in a sentence, its place in the report
``EXAMPLES``                      examples by default
``cases(subject) -> strategy``    what to try; raises Inapplicable when the property says nothing about the subject
``check(subject, case) -> Measure``   raises Violation when it does not hold, Inapplicable when the example says nothing
``note(subject) -> str``          optional: what a reader needs to know of its facts
``finish(subject, measures)``     optional: what must hold over all examples together

Its docstring is the definition, with the reason why one wants it to hold.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType


@functools.cache
def every() -> tuple[ModuleType, ...]:
    """All properties in the order of the report."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return tuple(sorted(modules, key=lambda m: m.ORDER))


def names() -> tuple[str, ...]:
    """Names of all properties."""
    return tuple(m.NAME for m in every())


def get(name: str) -> ModuleType:
    """The property called ``name``. Raises ValueError naming the valid ones."""
    for module in every():
        if name == module.NAME:
            return module
    raise ValueError(f"unknown property {name!r}; properties: {', '.join(names())}")
