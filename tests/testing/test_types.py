"""Types of transformers through the toolkit: every property, all attentions rewritten, none silently dense.

A sample by default; all of them, and the table of the docs, with STEM_COMPILE_FULL=1.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stem_compile.testing import Report, check_model, properties
from tests.testing.model_types import TYPES, known, model_of
from tests.testing.models import encoder, plain

DOCS = Path(__file__).parents[2] / "docs" / "types.md"
FULL = bool(os.environ.get("STEM_COMPILE_FULL"))
SAMPLE = ("gpt2", "glm")
CORE = ["dense-equivalence", "kernel-exactness", "coverage", "block-causality", "batch-invariance"]
ASKED, EXAMPLES = (None, 2) if FULL else (CORE, 1)
OTHERS: dict[str, tuple[Callable[[], torch.nn.Module], int]] = {
    "a module without transformers": (plain, 1),
    "torch.nn.TransformerEncoder": (encoder, 0),
}
"""Name -> (what makes the model, attentions to be rewritten)."""

_rows: dict[str, tuple[int, Report]] = {}


def _parameters() -> list[Any]:
    whole = pytest.mark.skipif(not FULL, reason="STEM_COMPILE_FULL=1 checks every type; by default a sample")
    return [pytest.param(name, marks=[] if name in SAMPLE else [whole, pytest.mark.slow]) for name in TYPES]


@pytest.mark.parametrize("name", _parameters())
def test_a_type_has_every_property(name: str) -> None:
    if not known(name):
        pytest.skip(f"the installed transformers has no type {name!r}")
    _hold(name, model_of(name), TYPES[name].sites)


@pytest.mark.parametrize("name", OTHERS)
def test_so_has_what_is_none_of_transformers(name: str) -> None:
    make, sites = OTHERS[name]
    _hold(name, make(), sites)


def _hold(name: str, model: torch.nn.Module, sites: int) -> None:
    report = check_model(model, properties=ASKED, max_examples=EXAMPLES, expected=sites)
    report.raise_for_failures()
    _rows[name] = sites, report
    if sites:
        verdicts = {r.name: r.verdict for r in report.results}
        assert {verdicts[n] for n in CORE} == {"pass"}, report


def test_there_are_enough() -> None:
    assert len(TYPES) >= 30
    assert set(SAMPLE) <= set(TYPES)


def test_the_docs_have_every_type() -> None:
    written = {row[0]: int(row[1]) for row in re.findall(r"^\| ([\w. ]+?) \| (\d+) \|", DOCS.read_text(), re.MULTILINE)}
    assert written == {n: t.sites for n, t in TYPES.items()} | {n: sites for n, (_, sites) in OTHERS.items()}, HOW


def test_the_table_in_the_docs_is_this_one() -> None:
    if not FULL or set(_rows) < set(OTHERS) | {n for n in TYPES if known(n)}:
        pytest.skip("needs STEM_COMPILE_FULL=1 and every type of this file in the same run")
    expected = table()
    if os.environ.get("STEM_COMPILE_WRITE_DOCS"):
        DOCS.write_text(expected)
    # Errors depend on the machine.
    written, expected = (
        re.sub(r"\d\.\d\d|under transformers .*$", "", text, flags=re.MULTILINE)
        for text in (DOCS.read_text(), expected)
    )
    assert written == expected, HOW


HOW = "run with STEM_COMPILE_FULL=1 STEM_COMPILE_WRITE_DOCS=1 and commit docs/types.md"


def table() -> str:
    """docs/types.md."""
    import transformers

    rows = []
    for name, (sites, report) in _rows.items():
        worst = {r.name: r.worst for r in report.results}
        held = [r.name for r in report.results if r.verdict == "pass"]
        rest = "; ".join(f"{r.name}: {r.reason}" for r in report.results if r.verdict == "not applicable")
        errors = " | ".join(f"{worst[n]:.2f}" if worst[n] else "-" for n in ("dense-equivalence", "kernel-exactness"))
        rows.append(f"| {name} | {sites} | {len(held)} | {errors} | {max(worst.values()):.2f} | {rest or '-'} |")
    return "\n".join(
        [
            "# Types",
            "",
            (
                "Tiny models with random weights in float32, two layers each, through `check_model`: all properties, at"
                " most two examples each, seed 0, weights"
            ),
            (
                "scaled so that attention is far from uniform. Every attention named is rewritten, and coverage fails"
                " when one is not. Errors are relative to what"
            ),
            "each model's own error in its dtype allows, so 1.00 would be a failure. Written by",
            (
                "`STEM_COMPILE_FULL=1 STEM_COMPILE_WRITE_DOCS=1 pytest tests/testing/test_types.py`; to add a type, add"
                " a line to `tests/testing/model_types.py`."
            ),
            f"Run under transformers {transformers.__version__} and torch {torch.__version__.split('+')[0]}.",
            "",
            (
                f"| type | attentions rewritten | properties that hold (of {len(properties.names())}) | error at budget"
                " 1.0 | error under the selected blocks | worst error | not applicable |"
            ),
            "|---|---:|---:|---:|---:|---:|---|",
            *rows,
            "",
        ]
    )
