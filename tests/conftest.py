"""Process-wide test set-up: Hypothesis profiles, and Triton's interpreter where there is no GPU (read when triton is first imported)."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]}
settings.register_profile("dev", max_examples=20, **_SLOW)
settings.register_profile("ci", max_examples=25, derandomize=True, **_SLOW)
settings.register_profile("nightly", max_examples=500, **_SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))
