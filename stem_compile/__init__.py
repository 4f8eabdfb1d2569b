"""``torch.compile(model, backend="stem")``: training-free block-sparse prefill for any model's attention.

The backend is found by its entry point and needs no import. This package names what users write down: ``StemConfig``
(every option), ``explain`` (what would be rewritten and why), ``report`` and ``last_report`` (what runs),
``sparse_prefill`` (packed and paged prefill for serving engines), ``register_attention`` (transformers without
compiling), errors, warnings and reasons, ``testing``, and the registries ``policies``, ``patterns`` and ``targets`` to
which others add. Importing it loads neither triton nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stem_compile import testing
    from stem_compile.backend import StemError
    from stem_compile.config import OptionError, StemConfig
    from stem_compile.explanation import Explanation, explain, last_report, report
    from stem_compile.kernels.contract import TARGETS as targets
    from stem_compile.passes.match import PATTERNS as patterns
    from stem_compile.reasons import Reason, StemWarning
    from stem_compile.running import Site
    from stem_compile.selection.policies import POLICIES as policies
    from stem_compile.serving.packed import sparse_prefill
    from stem_compile.serving.transformers import register_attention

__version__ = "0.1.0"
"""The only place where the version is written down; the package's metadata reads it here."""

__all__ = [
    "Explanation",
    "OptionError",
    "Reason",
    "Site",
    "StemConfig",
    "StemError",
    "StemWarning",
    "explain",
    "last_report",
    "patterns",
    "policies",
    "register_attention",
    "report",
    "sparse_prefill",
    "targets",
    "testing",
]

_HOMES = {
    "Explanation": ("stem_compile.explanation", "Explanation"),
    "OptionError": ("stem_compile.config", "OptionError"),
    "Reason": ("stem_compile.reasons", "Reason"),
    "Site": ("stem_compile.running", "Site"),
    "StemConfig": ("stem_compile.config", "StemConfig"),
    "StemError": ("stem_compile.backend", "StemError"),
    "StemWarning": ("stem_compile.reasons", "StemWarning"),
    "explain": ("stem_compile.explanation", "explain"),
    "last_report": ("stem_compile.explanation", "last_report"),
    "patterns": ("stem_compile.passes.match", "PATTERNS"),
    "policies": ("stem_compile.selection.policies", "POLICIES"),
    "register_attention": ("stem_compile.serving.transformers", "register_attention"),
    "report": ("stem_compile.explanation", "report"),
    "sparse_prefill": ("stem_compile.serving.packed", "sparse_prefill"),
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
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__})
