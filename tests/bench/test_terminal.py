"""Tables never cut a number, and progress says how much is left."""

from __future__ import annotations

import re

import pytest

from stem_compile.bench.terminal import Progress, Table

TABLE = Table(
    "a model with a long name, float32, 2 cores of some processor, 24 GiB",
    ("tokens", "contender", "prefill", "speed-up", "memory", "density", "difference"),
    [
        ("8,192", "eager", "40.2 s", "1.00x", "1.01 GiB", "-", "0.0e+00"),
        ("8,192", "stem", "26.8 s", "1.50x", "842 MiB", "28%", "1.4e-02"),
        ("131,072", "stem", "4371.0 s", "12.70x", "146.00 GiB", "6%", "1.4e-02"),
    ],
    ("contender",),
    [8192, 8192, 131072],
)


@pytest.mark.parametrize("columns", [20, 24, 40, 60, 80, 120, None])
def test_no_number_is_cut_at_any_width(columns: int | None) -> None:
    text = TABLE.text(columns)
    for row in TABLE.rows:
        for cell in row:
            assert re.search(rf"(?<![\w.,]){re.escape(cell)}(?![\w.,])", text), (columns, cell, text)
    if columns is not None:
        assert max(map(len, text.splitlines())) <= columns, text


def test_columns_are_aligned_where_they_fit() -> None:
    lines = TABLE.text(None).splitlines()[1:]
    assert len({len(line) for line in lines if line}) == 1
    assert "" in lines


def test_progress_counts_and_estimates(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    progress = Progress(2)
    progress.doing("one")
    progress.finished("one: 10 s")
    progress.finished("two: 10 s")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["[1/2] one: 10 s; about 10 s left", "[2/2] two: 10 s"]
