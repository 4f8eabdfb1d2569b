"""``torch.compile(model, backend="stem")``: training-free block-sparse prefill for any model's attention.

The backend is found by its entry point and needs no import. This package names what users write down: ``StemConfig``
(every option), ``explain`` (what would be rewritten and why), ``testing``, and the registries ``policies``,
``patterns`` and ``targets`` to which others add. Importing it loads neither triton nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stem_compile import testing
    from stem_compile.config import StemConfig
    from stem_compile.explanation import explain
    from stem_compile.kernels.contract import TARGETS as targets
    from stem_compile.passes.match import PATTERNS as patterns
    from stem_compile.selection.policies import POLICIES as policies
    from stem_compile.serving.transformers import register_attention

__version__ = "0.1.0"
"""The only place where the version is written down; the package's metadata reads it here."""

__all__ = ["StemConfig", "explain", "patterns", "policies", "register_attention", "targets", "testing"]

_HOMES = {
    "StemConfig": ("stem_compile.config", "StemConfig"),
    "explain": ("stem_compile.explanation", "explain"),
    "patterns": ("stem_compile.passes.match", "PATTERNS"),
    "policies": ("stem_compile.selection.policies", "POLICIES"),
    "register_attention": ("stem_compile.serving.transformers", "register_attention"),
    "targets": ("stem_compile.kernels.contract", "TARGETS"),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module, attribute = _HOMES[name]
        value = getattr(importlib.import_module(module), attribute)
    elif name == "testing":
        value = importlib.import_module("stem_compile.testing")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
