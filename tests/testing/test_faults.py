"""Every planted fault is caught by the property that is named for it, and the docs say so.

One fault a property by default; all of them, and the table of the docs, with STEM_COMPILE_FULL=1.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stem_compile.testing import properties
from stem_compile.testing.search import search
from stem_compile.testing.subject import Subject
from tests.testing.faults import FAULTS, Fault, table, versions
from tests.testing.models import SUBJECTS

DOCS = Path(__file__).parents[2] / "docs" / "faults.md"
SEED = 0

FULL = bool(os.environ.get("STEM_COMPILE_FULL"))

_needed: dict[str, int] = {}


def _parameters() -> list[Any]:
    """All faults; those after the first of a property are skipped by default."""
    whole = pytest.mark.skipif(not FULL, reason="STEM_COMPILE_FULL=1 plants every fault; by default one a property")
    properties_so_far: set[str] = set()
    parameters = []
    for fault in FAULTS:
        parameters.append(
            pytest.param(
                fault, id=fault.name, marks=[whole, pytest.mark.slow] if fault.caught_by in properties_so_far else []
            )
        )
        properties_so_far.add(fault.caught_by)
    return parameters


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """Instead of the one that forgets all traces before every test: the faults share them."""


@pytest.fixture(scope="module")
def subjects() -> Iterator[Callable[[str], Subject]]:
    """One traced model of each kind for all faults; each has its graphs rewritten anew."""
    torch._dynamo.reset()
    logging.disable(logging.CRITICAL)
    yield functools.cache(lambda name: Subject(SUBJECTS[name]()))
    logging.disable(logging.NOTSET)
    torch._dynamo.reset()


@pytest.mark.parametrize("fault", _parameters())
def test_is_caught(fault: Fault, subjects: Callable[[str], Subject]) -> None:
    subject = subjects(fault.model)
    module = properties.get(fault.caught_by)
    with fault.planted(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject.forget()
        result = search(subject, module, module.EXAMPLES, SEED, shrink=False)
    subject.forget()
    assert result.failure is not None, f"{fault.caught_by} held for {result.examples} examples (seed {SEED})"
    _needed[fault.name] = result.failure.needed


def test_there_are_enough_and_none_twice() -> None:
    assert len({f.name for f in FAULTS}) == len(FAULTS) >= 25
    # Fidelity reports and does not judge.
    assert {f.caught_by for f in FAULTS} == set(properties.names()) - {"fidelity"}


def test_the_table_in_the_docs_is_this_one() -> None:
    if len(_needed) < len(FAULTS):
        pytest.skip("needs STEM_COMPILE_FULL=1 and every fault of this file in the same run")
    expected = table((fault, _needed[fault.name]) for fault in FAULTS)
    if os.environ.get("STEM_COMPILE_WRITE_DOCS"):
        DOCS.write_text(expected)
    written = DOCS.read_text()
    if versions() not in written:
        # Other versions draw other examples: only the numbers may differ.
        written, expected = (
            re.sub(r"\| \d+ \|$|under Hypothesis .*$", "", text, flags=re.MULTILINE) for text in (written, expected)
        )
    assert written == expected, "run with STEM_COMPILE_FULL=1 STEM_COMPILE_WRITE_DOCS=1 and commit docs/faults.md"
