"""All faults, each the mistake that someone makes some day, with the property that must catch it; and the table of them
that the docs show."""

from __future__ import annotations

from collections.abc import Iterable

import hypothesis
import torch

from stem_compile.testing import properties
from tests.testing import faults_of_kernels, faults_of_mass, faults_of_passes, faults_of_selection
from tests.testing.plants import FAULTS as PLANTED
from tests.testing.plants import Fault

__all__ = ["FAULTS", "PLACES", "Fault", "table"]

PLACES = (faults_of_passes, faults_of_kernels, faults_of_selection, faults_of_mass)
_FILES = [place.__name__ for place in PLACES]
FAULTS = sorted(
    PLANTED, key=lambda fault: (properties.names().index(fault.caught_by), _FILES.index(fault.plant.__module__))
)
"""In the order of the properties, so that those which share traces run side by side; then in that of the files,
whichever was imported first."""


def versions() -> str:
    """What the drawn examples depend on besides the seed."""
    return f"Hypothesis {hypothesis.__version__} and torch {torch.__version__.split('+')[0]}"


def table(caught: Iterable[tuple[Fault, int]]) -> str:
    """docs/faults.md: (fault, examples until it was caught) -> Markdown."""
    rows = [f"| {fault.name} | {fault.caught_by} | {needed} |" for fault, needed in caught]
    return "\n".join(
        [
            "# Planted faults",
            "",
            (
                "Each is planted into the passes or the CPU target; the property named must fail on a tiny Llama within"
                " its default number of examples. Written by"
            ),
            (
                "`STEM_COMPILE_FULL=1 STEM_COMPILE_WRITE_DOCS=1 pytest tests/testing/test_faults.py`; with the first"
                " alone it fails when the table is old."
            ),
            f"Examples are those of seed 0 under {versions()}.",
            "",
            "| fault | caught by | at example |",
            "|---|---|---|",
            *rows,
            "",
            (
                f"{len(rows)} of {len(FAULTS)} are caught. What no property can catch is a selection that is consistent"
                " but poor: that is for bounds on fidelity."
            ),
            "",
        ]
    )
