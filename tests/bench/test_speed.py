"""``bench`` compares at every length, and says why nothing was sparse where nothing was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from stem_compile.bench import report
from stem_compile.bench.contender import Contender
from stem_compile.bench.machine import settings
from stem_compile.bench.speed import Speed, bench, lengths
from stem_compile.bench.target import Target, load
from stem_compile.packages import UserError
from tests.tiny import tiny_llama


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    tiny_llama().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("stem_compile.bench.speed.RIVALS", (Contender("eager"),))
    return load(str(tmp_path / "model"), "cpu", torch.float32)


def test_bench_compares_at_every_length(target: Target) -> None:
    options = {"inner": "eager", "budget": 1.0, "min_length": 1}
    results = list(bench(target, [256, 512], options, 1, "cpu"))
    assert [(r.tokens, [row.name for row in r.rows]) for r in results] == [
        (256, ["eager", "stem"]),
        (512, ["eager", "stem"]),
    ]
    rows = [row for r in results for row in r.rows]
    assert all(row.difference < 1e-4 for row in rows)
    assert all(row.density == 1.0 for row in rows if row.name == "stem")
    assert all(row.low <= row.seconds <= row.high for row in rows)


def test_what_stays_dense_is_said_with_the_reason(target: Target) -> None:
    results = list(bench(target, [256], {"inner": "eager"}, 1, "cpu"))
    (remark,) = Speed({}, results).remarks()
    assert remark.startswith("256 tokens: every attention stayed dense; 2 of them: ")
    assert "7,168" in remark or "7168" in remark


def test_default_lengths_are_those_at_which_something_happens(target: Target) -> None:
    assert lengths(target, {"budget": 0.25}) == [2048, 4096]
    assert lengths(target, {"budget": 0.25, "min_length": 3000}) == [4096]
    with pytest.raises(UserError, match="has positions for 4,096 tokens, and attention stays dense below 7,168"):
        lengths(target, {})


def test_files_hold_what_was_measured(target: Target, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = {"inner": "eager", "budget": 1.0, "min_length": 1}
    results = list(bench(target, [256, 512], options, 1, "cpu"))
    speed = Speed(settings("<my> model", "cpu", torch.float32, options), results)
    report.write(speed, tmp_path, "bench")
    page = (tmp_path / "bench.html").read_text()
    assert "&lt;my&gt; model" in page
    assert "<script" not in page
    assert "http" not in page.replace("http://www.w3.org/", "").replace("http://purl.org/", "").replace(
        "http://creativecommons.org/", ""
    ).replace("https://matplotlib.org/", "")
    assert page.count("<svg") == 2
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    assert '"tokens": 512' in (tmp_path / "bench.json").read_text()
