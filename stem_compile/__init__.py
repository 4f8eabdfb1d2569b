"""``torch.compile(model, backend="stem")``: training-free block-sparse prefill for any model's attention.

The backend is found by its entry point and needs no import. This package names what users write down: ``StemConfig``
(every option),
``explain`` (what would be rewritten and why) and ``testing``. Importing it loads neither triton nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stem_compile import testing
    from stem_compile.config import StemConfig
    from stem_compile.explanation import explain

__all__ = ["StemConfig", "explain", "testing"]

_HOMES = {"StemConfig": "stem_compile.config", "explain": "stem_compile.explanation"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name == "testing":
        value = importlib.import_module("stem_compile.testing")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
