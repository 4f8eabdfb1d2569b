"""``tune`` keeps its bound, finds the least budget that does, and says what it did not test."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from stem_compile.bench import tune as tuning
from stem_compile.bench.tune import BUDGETS, Bound, Search, Trial, Tuner, distinct_budgets, families
from stem_compile.commands.arguments import backend_options
from stem_compile.config import StemConfig
from stem_compile.packages import UserError
from tests.commandline import stem_compile
from tests.tiny import tiny_llama

SHELL = ["-o", "min_length=1", "-o", "block_size=64", "-o", "sink_blocks=0"]


class Known(Tuner):
    """A tuner whose trials are a formula: KL halves as the budget doubles; no model is run."""

    def __init__(self, bound: Bound) -> None:
        self.bound, self.search, self.device = bound, Search(dense_seconds=2.0), "cpu"
        self.tokens = 0
        self.asked: list[float] = []

    def trial(self, options: Mapping[str, Any]) -> Trial:
        self.asked.append(options["budget"])
        texts = {"a": {"kl": 0.005 / options["budget"]}, "b": {"kl": 0.004 / options["budget"]}}
        outcome = Trial(dict(options), self.bound.excess(texts), texts, options["budget"], options["budget"])
        self.search.trials.append(outcome)
        return outcome


@pytest.mark.parametrize("limit", [1e-9, 0.0072, 0.02, 0.05, 0.16, 9.0])
def test_the_search_finds_the_least_budget_within_the_bound(limit: float) -> None:
    tuner = Known(Bound(kl=limit))
    list(tuner.least_budget({}, lambda what: None))
    expected = next((b for b in BUDGETS if 0.005 / b <= limit), None)
    assert (tuner.search.best.options["budget"] if tuner.search.best else None) == expected
    assert len(tuner.asked) <= len(BUDGETS).bit_length()


def test_the_worst_text_counts_and_both_bounds() -> None:
    texts = {"a": {"kl": 0.01, "nll change": 0.5}, "b": {"kl": 0.03, "nll change": -0.1}}
    assert Bound(kl=0.02).excess(texts) == pytest.approx(1.5)
    assert Bound(nll=0.25).excess(texts) == pytest.approx(2)
    assert Bound(kl=0.02, nll=0.25).excess(texts) == pytest.approx(2)
    assert Bound(kl=0.02).words == "KL at most 0.02"
    assert Bound(nll=0.1).excess({"a": {"kl": 0.0}}) == float("inf")


def test_dense_is_the_answer_where_nothing_is_faster_or_within() -> None:
    inside = Trial({"budget": 0.5}, 0.5, {"a": {"kl": 0.0}}, 1.0, 0.5)
    assert Search([inside], dense_seconds=0.9).best is None
    assert Search([inside], dense_seconds=1.1).best is inside
    timed = Trial({"budget": 0.25}, 0.9, {"a": {"kl": 0.0}}, 1.0, 0.3, final_seconds=1.5)
    assert Search([inside, timed], 2.0, eager_seconds=2.0, inductor_seconds=1.6).best is timed
    assert Search([inside, timed], 2.0, eager_seconds=2.0, inductor_seconds=1.4).best is None


def test_budgets_that_compute_the_same_are_not_told_apart() -> None:
    assert distinct_budgets({}, 0) == list(BUDGETS)
    assert distinct_budgets({}, 131072) == list(BUDGETS)
    # 16 rows of blocks: three forced ones a row are 42.6% of the pairs, which is what 0.25 and all below it compute.
    assert distinct_budgets({}, 2048)[0] >= 0.25
    assert set(distinct_budgets({}, 2048)) < set(BUDGETS)


def test_families_are_valid_different_and_hold_the_users_options() -> None:
    own = families({"key_block_size": 32})
    assert own
    assert all(f["key_block_size"] == 32 for f in own)
    selections = [StemConfig.from_options({**f, "budget": 0.25}) for f in families({})]
    assert len({(c.selection, c.dense_layers) for c in selections}) == len(selections)


def test_tune_writes_options_that_the_backend_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    tiny_llama().save_pretrained(tmp_path / "model")

    def timed(self: Tuner, most: int, repeats: int, doing: object) -> None:
        for trial in self.search.trials:
            trial.final_seconds = trial.seconds
        self.search.eager_seconds = self.search.inductor_seconds = 1e9

    monkeypatch.setattr(Tuner, "time_finalists", timed)
    monkeypatch.setattr(tuning, "FAMILIES", ({}, {"key_block_size": 32}))
    args = ["--tokens", "1024", "--max-kl", "1e-4", "--out", str(tmp_path)]
    done = stem_compile("tune", str(tmp_path / "model"), *args, *SHELL)
    assert done.status == 0, done
    assert "fastest within KL at most 0.0001" in done.out
    assert "not tested:" in done.out
    options = backend_options([f"@{tmp_path / 'options.json'}"])
    written = json.loads((tmp_path / "tune.json").read_text())
    assert written["options"] == options
    assert options["block_size"] == 64
    best = [t for t in written["search"]["trials"] if t["options"] == options]
    assert best[0]["excess"] <= 1
    assert all(max(x["kl"] for x in t["texts"].values()) <= 1e-4 for t in best)
    assert (tmp_path / "tune.html").read_text().count("<svg") == 2


def test_a_bound_that_nothing_keeps_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(tuning, "FAMILIES", ({},))
    args = ["--tokens", "512", "--max-kl", "1e-30", "--out", str(tmp_path), "--repeats", "1"]
    done = stem_compile("tune", str(tmp_path / "model"), *args, *SHELL)
    assert done.status == 3
    assert "leave this model dense" in done.out
    assert not (tmp_path / "options.json").exists()


@pytest.mark.parametrize(("content", "said"), [("{", "no JSON"), ("[1]", "JSON of an object"), (None, "No such file")])
def test_files_of_options_are_read_with_care(tmp_path: Path, content: str | None, said: str) -> None:
    if content is not None:
        (tmp_path / "o.json").write_text(content)
    with pytest.raises(UserError, match=said):
        backend_options([f"@{tmp_path / 'o.json'}"])


def test_later_options_win_over_a_file(tmp_path: Path) -> None:
    (tmp_path / "o.json").write_text('{"budget": 0.5, "stride": 8}')
    assert backend_options([f"@{tmp_path / 'o.json'}", "budget=0.25"]) == {"budget": 0.25, "stride": 8}
