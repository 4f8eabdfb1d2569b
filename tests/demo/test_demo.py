"""The demo's parts: the prompt is what it says, the measurements measure, and the report shows what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stem_compile.bench import machine
from stem_compile.bench.measure import CHUNK, Prefill, greedy, predictions, run
from stem_compile.bench.packages import Mendable, MissingPackage, need
from stem_compile.bench.speed import bench, table
from stem_compile.bench.target import load, smollm
from stem_compile.demo import chart
from stem_compile.demo.race import Contender, Result, Stage, contenders, race
from stem_compile.demo.report import COLUMNS, Report, memory, seconds
from stem_compile.demo.text import KEY, NEEDLE, QUESTION, Prompt, documentation, prompt

transformers = pytest.importorskip("transformers")


class Characters:
    """A tokenizer with one token a character."""

    def __call__(self, text: str) -> Any:
        return transformers.BatchEncoding({"input_ids": [ord(c) for c in text]})

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def tiny_llama(vocab: int = 64) -> Any:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, max_position_embeddings=4096)).eval()


@pytest.mark.parametrize("tokens", [1000, 8191])
@pytest.mark.parametrize("position", [0.0, 0.5, 1.0])
def test_prompt_has_the_length_the_needle_and_the_question(tokens: int, position: float) -> None:
    written = prompt(Characters(), tokens, position=position)
    text = Characters().decode(written.ids)
    assert len(text) == tokens
    assert text.endswith(QUESTION)
    assert text.count(NEEDLE.format(key=KEY)) == 1
    assert text.index(NEEDLE.format(key=KEY)) == written.needle
    assert Characters().decode(written.answer) == KEY
    assert KEY not in documentation()


def test_prompt_refuses_lengths_it_cannot_have() -> None:
    with pytest.raises(Mendable, match="give at least"):
        prompt(Characters(), 100)
    with pytest.raises(Mendable, match="ask for at most"):
        prompt(Characters(), 10**7)


def test_prefill_is_the_model() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 64, (1, 40))
    with torch.inference_mode():
        logits, hidden, cache = Prefill(model)(ids)
        whole = model(ids).logits
        torch.testing.assert_close(logits, whole[:, -1:])
        torch.testing.assert_close(model.lm_head(hidden), whole)
    assert cache.get_seq_length() == 40


def test_predictions_do_not_depend_on_the_chunks() -> None:
    tokens, head = 2 * CHUNK + 5, torch.nn.Linear(8, 30)
    hidden, ids = torch.randn(1, tokens, 8), torch.randint(0, 30, (1, tokens))
    found = predictions(hidden, head, ids)
    logits = head(hidden)[0, :-1].detach()
    torch.testing.assert_close(found.nll, torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    assert torch.equal(found.top1, logits.argmax(-1))


def test_greedy_is_generate() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 64, (1, 20))
    with torch.inference_mode():
        logits, _, cache = Prefill(model)(ids)
        generated = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, eos_token_id=None
        )
    assert greedy(model, logits, cache, 4) == generated[0, 20:].tolist()


def test_run_sees_memory_that_is_gone_when_it_returns() -> None:
    size = 256 << 20

    def hungry() -> int:
        return torch.ones(size, dtype=torch.uint8).numel()

    measured = run("cpu", hungry)
    if measured.peak_bytes is None:
        pytest.skip("this system has no high-water mark that can be reset")
    assert measured.output == size
    # The kernel counts resident pages in batches, a thread at a time.
    assert size - (1 << 20) <= measured.peak_bytes < 1.5 * size
    modest = run("cpu", lambda: 0)
    assert modest.peak_bytes is not None
    assert modest.peak_bytes < size / 8


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

    stages: list[Stage] = []
    entered = [Contender("eager"), Contender("dense", "eager"), Forgetful("worse")]
    eager, dense, worse = race(model, Characters(), written, entered, 3, "cpu", stages.append)
    assert [len(r.seconds) for r in (eager, dense, worse)] == [3, 3, 3]
    assert (dense.nll_change, dense.agreement, dense.density) == (pytest.approx(0, abs=1e-6), 1.0, 1.0)
    assert dense.answer == eager.answer
    assert worse.nll_change == pytest.approx(worse.nll - eager.nll, abs=1e-5)
    assert worse.agreement < 0.9
    assert stages[-1].done == stages[-1].total == 12


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
def report() -> Report:
    settings = {"model": "M", "tokens": 8192, "dtype": "float32", "machine": "2 cores"}
    results = [
        Result("eager", [4.0, 6.0, 5.0], peak_bytes=3 << 30, nll=2.0, passkey_found=True),
        Result("inductor", [5.0], 20.0, 2 << 30, nll=2.0, passkey_found=True),
        Result("stem, budget 0.25", [2.0], 30.0, 500 << 20, 0.257, 2.01, 0.01, 0.955, "12", False),
    ]
    return Report(settings, results)


def test_report_rows_and_json_agree(report: Report, tmp_path: Path) -> None:
    assert report.rows()[0] == ("eager", "5.0 s", "1.00x", "3.00 GiB", "100%", "2.000 (NLL)", "100.0%", "found", "-")
    assert report.rows()[2] == (
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
    assert report.markdown().splitlines()[0].count("|") == len(COLUMNS) + 1
    report.write(tmp_path / "demo.json")
    written = json.loads((tmp_path / "demo.json").read_text())
    assert [r["median_seconds"] for r in written["results"]] == [5.0, 5.0, 2.0]
    assert written["settings"]["tokens"] == 8192


def test_chart_is_a_picture(report: Report, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    chart.draw(report, tmp_path / "demo.png")
    pixels = image.imread(tmp_path / "demo.png")
    assert pixels.shape[1] > 1000
    assert len({tuple(p) for p in pixels[::5, ::5, :3].reshape(-1, 3).round(2).tolist()}) > 3


def test_units() -> None:
    assert [seconds(0.0123), seconds(1.26)] == ["12.3 ms", "1.3 s"]
    assert [memory(None), memory(5 << 20), memory(3 << 29)] == ["-", "5 MiB", "1.50 GiB"]
    assert "torch" in machine.describe("cpu")


def test_missing_packages_are_named_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingPackage, match="pip install no_such_package"):
        need("torch", "no_such_package")
    monkeypatch.setattr("stem_compile.bench.target.SMOLLM", "no_such_model")
    with pytest.raises(MissingPackage, match="no_such_model"):
        smollm("cpu", torch.float32)


def test_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    folder = load(str(tmp_path / "model"), "cpu", torch.float32)
    _, kwargs = folder.inputs(7)
    assert kwargs["input_ids"].shape == (1, 7)
    assert folder.model(**kwargs).logits.shape == (1, 1, 64)
    (tmp_path / "mine.py").write_text(
        "import torch\nclass Same(torch.nn.Module):\n    def forward(self, x):\n        return x * 1\n"
        "def make(tokens):\n    return Same(), (torch.ones(1, tokens, 8),)\ndef bare():\n    return Same()\n"
    )
    monkeypatch.chdir(tmp_path)
    made = load("mine:make", "cpu", torch.float32)
    args, kwargs = made.inputs(9)
    assert made.model(*args, **kwargs).shape == (1, 9, 8)
    for wrong, said in (
        ("mine:bare", "tokens"),
        ("mine:absent", "absent"),
        ("absent:x", "absent"),
        (str(tmp_path / "x.gguf"), "no such file"),
    ):
        with pytest.raises(Mendable, match=said):
            load(wrong, "cpu", torch.float32)


def test_bench_compares_at_every_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    monkeypatch.setattr("stem_compile.bench.speed.RIVALS", (Contender("eager"),))
    target = load(str(tmp_path / "model"), "cpu", torch.float32)
    rows = list(
        bench(target, [256, 512], {"inner": "eager", "budget": 1.0, "min_length": 1}, 1, "cpu", lambda what: None)
    )
    assert [(r.tokens, r.name) for r in rows] == [(256, "eager"), (256, "stem"), (512, "eager"), (512, "stem")]
    assert all(r.difference < 1e-4 for r in rows)
    assert all(r.density == 1.0 for r in rows if r.name == "stem")
    assert table("title", rows).row_count == 4
