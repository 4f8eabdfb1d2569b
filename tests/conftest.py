"""Process-wide test set-up: Hypothesis profiles, devices, and Triton's interpreter where there is no GPU (read when
triton is first imported)."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # Inductor's CPU code does not use triton, so both live in one process.
    os.environ.setdefault("TRITON_INTERPRET", "1")

_QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile("dev", deadline=None, max_examples=20, suppress_health_check=_QUIET)
settings.register_profile(
    "ci", deadline=None, max_examples=20, derandomize=True, print_blob=True, suppress_health_check=_QUIET
)
settings.register_profile("nightly", deadline=None, max_examples=500, suppress_health_check=_QUIET)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests need a GPU; the reason is in the summary."""
    if torch.cuda.is_available():
        return
    for item in items:
        # Not in item.keywords: those hold the ids of parameters and the names of files too.
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device"))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
