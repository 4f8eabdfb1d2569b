"""Selection policies, one file each, found by name. A policy module has

``budget(spec) -> sympy.Expr``   blocks that row ``ROW`` of ``BLOCKS`` computes: integer arithmetic, so it is exact on
every device
``width(spec, key_blocks)``      upper bound of a listed row's length, affine in key_blocks (an int or SymInt)
``min_length(spec) -> int``      shortest prompt worth selecting on
``SCORED``                       whether block scores are needed at all
``ANY_ORDER``                    whether it means something where no causal order is (bidirectional encoders)
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from types import ModuleType


@functools.cache
def names() -> tuple[str, ...]:
    """All policies, sorted."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__)))


@functools.cache
def get(name: str) -> ModuleType:
    """The policy module called ``name``. Raises ValueError naming the valid ones."""
    if name not in names():
        raise ValueError(f"unknown policy {name!r}; policies: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")
