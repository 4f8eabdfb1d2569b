"""The pytest plugin: ``@pytest.mark.stem(...)``, the fixture ``stem_check`` and ``pytest --stem-options budget=0.25``.

Loaded by its entry point in every pytest run where stem-compile is installed, so nothing heavy is imported before a
test asks for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from stem_compile.testing.report import Report

MARK = (
    "stem(options={...}, properties=[...], max_examples=n, expected=n): arguments of check_model for the fixture"
    " stem_check"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options ``--stem-options`` and ``--stem-seed``."""
    group = parser.getgroup("stem-compile")
    group.addoption(
        "--stem-options",
        default="",
        metavar="NAME=VALUE,...",
        help="options of backend 'stem' for stem_check, such as budget=0.25,pooling=max",
    )
    group.addoption(
        "--stem-seed", default=0, type=int, metavar="N", help="seed of the examples that stem_check draws (default 0)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """The marker ``stem``."""
    config.addinivalue_line("markers", MARK)


def options_from(text: str) -> dict[str, Any]:
    """Options of "budget=0.25,pooling=max". Raises pytest.UsageError for what is not NAME=VALUE or no option."""
    from stem_compile.config import OptionError, written_options

    try:
        # A comma inside a value, as in dense_layers=(0, 1), has no name behind it.
        return written_options(filter(None, re.split(r",\s*(?=[a-z_]+\s*=|[a-z_]*$)", text.strip().removesuffix(","))))
    except OptionError as error:
        raise pytest.UsageError(f"--stem-options: {error}") from None


@pytest.fixture
def stem_check(request: pytest.FixtureRequest) -> Callable[..., Report]:
    """``stem_check(model, make_inputs=None, **arguments of check_model)``: fails the test when a property does not
    hold; gives the report.

    Arguments are taken from the call, then from ``@pytest.mark.stem``, then from the command line; options of all three
    are merged in that order.
    """
    from stem_compile.testing import check_model

    marked: dict[str, Any] = {}
    for mark in reversed(list(request.node.iter_markers("stem"))):
        marked |= mark.kwargs
    typed = options_from(request.config.getoption("--stem-options"))

    def check(model: Any, make_inputs: Any = None, **arguments: Any) -> Report:
        merged = {"seed": request.config.getoption("--stem-seed")} | marked | arguments
        merged["options"] = typed | dict(marked.get("options") or {}) | dict(arguments.get("options") or {})
        report = check_model(model, make_inputs, **merged)
        # The whole report, failing snippet included, is the message.
        report.raise_for_failures()
        return report

    return check
