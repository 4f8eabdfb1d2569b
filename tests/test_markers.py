"""Tests are skipped by their markers and by nothing that is called as one."""

from __future__ import annotations

import pytest
import torch

from tests import conftest


def test_a_parameter_that_is_called_gpu_needs_none(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    request.node.keywords["gpu"] = True  # as pytest does for the id of a parameter
    conftest.pytest_collection_modifyitems([request.node])
    assert request.node.get_closest_marker("skip") is None


def test_a_test_that_is_marked_is_skipped_without_one(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    request.node.add_marker(pytest.mark.gpu)
    conftest.pytest_collection_modifyitems([request.node])
    assert request.node.get_closest_marker("skip") is not None
