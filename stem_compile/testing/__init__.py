"""Equivalence testing of anyone's model under ``backend="stem"``: for unit tests, for CI, and before putting it before
customers.

``assert_equivalent`` is one call for a unit test, ``check_model`` runs every property and gives a ``Report``,
``check_case`` runs one property on one example, and ``model_inputs``, ``attention_inputs``, ``masks`` and ``spellings``
are Hypothesis strategies for tests of one's own. Hypothesis is imported when one of them is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stem_compile.testing.case import Case
    from stem_compile.testing.check import check_case, check_model
    from stem_compile.testing.equivalence import assert_equivalent
    from stem_compile.testing.report import CheckInterrupted, Report
    from stem_compile.testing.spellings import spellings
    from stem_compile.testing.strategies import attention_inputs, masks, model_inputs
    from stem_compile.testing.violation import Violation

__all__ = [
    "Case",
    "CheckInterrupted",
    "Report",
    "Violation",
    "assert_equivalent",
    "attention_inputs",
    "check_case",
    "check_model",
    "masks",
    "model_inputs",
    "spellings",
]

_HOMES = {
    "Case": "case",
    "CheckInterrupted": "report",
    "Report": "report",
    "Violation": "violation",
    "assert_equivalent": "equivalence",
    "attention_inputs": "strategies",
    "check_case": "check",
    "check_model": "check",
    "masks": "strategies",
    "model_inputs": "strategies",
    "spellings": "spellings",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
