"""The demo's parts: the race measures, and the comparison shows what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stem_compile.bench.contender import Contender
from stem_compile.bench.passkey import Prompt
from stem_compile.bench.terminal import Progress
from stem_compile.demo import chart
from stem_compile.demo.comparison import COLUMNS, Comparison
from stem_compile.demo.race import Result, contenders, race
from tests.tiny import Characters, tiny_llama


def test_race_scores_a_dense_rival_as_equal_and_a_worse_one_as_worse() -> None:
    model = tiny_llama()
    written = Prompt(torch.randint(32, 64, (300,)).tolist(), [40, 41], 0)

    class Forgetful(Contender):
        def compile(self, module: Any) -> Any:
            def last_tokens_only(ids: torch.Tensor) -> Any:
                _, hidden, cache = module(ids)
                hidden = hidden + torch.randn_like(hidden)
                return module.head(hidden[:, -1:]), hidden, cache

            return last_tokens_only

    entered = [Contender("eager"), Contender("dense", "eager"), Forgetful("worse")]
    eager, dense, worse = race(model, Characters(), written, entered, 3, "cpu", progress := Progress(12))
    assert [len(r.seconds) for r in (eager, dense, worse)] == [3, 3, 3]
    assert (dense.nll_change, dense.agreement, dense.density) == (pytest.approx(0, abs=1e-6), 1.0, 1.0)
    assert dense.answer == eager.answer
    assert worse.nll_change == pytest.approx(worse.nll - eager.nll, abs=1e-5)
    assert worse.agreement < 0.9
    assert progress.done == 12


def test_contenders_are_the_rivals_the_schedule_and_every_budget() -> None:
    entered = contenders([0.5, 0.125], {"pooling": "max"})
    assert [(c.backend, c.options) for c in entered] == [
        (None, {}),
        ("inductor", {}),
        ("stem", {"pooling": "max"}),
        ("stem", {"key_block_size": 64, "stride": 8, "pooling": "max", "budget": 0.5}),
        ("stem", {"key_block_size": 64, "stride": 8, "pooling": "max", "budget": 0.125}),
    ]


@pytest.fixture
def comparison() -> Comparison:
    settings = {"model": "M", "tokens": 8192, "dtype": "float32", "machine": "2 cores"}
    results = [
        Result("eager", [4.0, 6.0, 5.0], peak_bytes=3 << 30, nll=2.0, passkey_found=True),
        Result("inductor", [5.0], 20.0, 2 << 30, nll=2.0, passkey_found=True),
        Result("stem, budget 0.25", [2.0], 30.0, 500 << 20, 0.257, 2.01, 0.01, 0.955, "12", False),
    ]
    return Comparison(settings, results)


def test_comparison_rows_and_json_agree(comparison: Comparison, tmp_path: Path) -> None:
    assert comparison.rows()[0] == (
        "eager",
        "5.0 s",
        "1.00x",
        "3.00 GiB",
        "100%",
        "2.000 (NLL)",
        "100.0%",
        "found",
        "-",
    )
    assert comparison.rows()[2] == (
        "stem, budget 0.25",
        "2.0 s",
        "2.50x",
        "500 MiB",
        "26%",
        "+0.010",
        "95.5%",
        "not found",
        "30.0 s",
    )
    assert comparison.markdown().splitlines()[0].count("|") == len(COLUMNS) + 1
    comparison.write(tmp_path / "demo.json")
    written = json.loads((tmp_path / "demo.json").read_text())
    assert [r["median_seconds"] for r in written["results"]] == [5.0, 5.0, 2.0]
    assert written["settings"]["tokens"] == 8192


def test_chart_is_a_picture(comparison: Comparison, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    chart.draw(comparison, tmp_path / "demo.png")
    pixels = image.imread(tmp_path / "demo.png")
    assert pixels.shape[1] > 1000
    assert len({tuple(p) for p in pixels[::5, ::5, :3].reshape(-1, 3).round(2).tolist()}) > 3
