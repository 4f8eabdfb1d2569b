"""``quality`` measures what was changed, and shows it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stem_compile.bench import quality
from stem_compile.bench.fidelity import Reader, fidelity
from stem_compile.bench.passkey import answered, haystack
from stem_compile.bench.prefill import Prefill
from stem_compile.bench.samples import samples
from stem_compile.bench.target import load
from stem_compile.packages import UserError
from stem_compile.testing.tolerances import CLOSE, CLOSE_DEEP
from tests.commandline import stem_compile
from tests.numerics import assert_close
from tests.tiny import Characters, tiny_llama

OPTIONS = {"inner": "eager", "min_length": 1, "block_size": 64, "key_block_size": 32, "sink_blocks": 0}
SHELL = [x for k, v in OPTIONS.items() for x in ("-o", f"{k}={v}")]


def test_fidelity_is_what_its_definition_says() -> None:
    torch.manual_seed(0)
    own, other = torch.randn(1100, 30), torch.randn(1100, 30)
    ids = torch.randint(0, 30, (1, 1100))
    comparison = fidelity(Reader(torch.nn.Identity(), lambda x: x, lambda x: x), own, other, ids)
    p, q = own.double().log_softmax(-1), other.double().log_softmax(-1)
    assert_close(comparison.kl.double(), (p.exp() * (p - q)).sum(-1), CLOSE[torch.float32], torch.float32)
    assert torch.equal(comparison.same_top1, p.argmax(-1) == q.argmax(-1))
    losses = [torch.nn.functional.cross_entropy(x[:-1], ids[0, 1:], reduction="none") for x in (other, own)]
    assert comparison.nll_change is not None
    assert_close(comparison.nll_change, losses[0] - losses[1], CLOSE_DEEP)
    half = comparison.summary()
    assert half["kl"] == pytest.approx(float(comparison.kl[550:].mean()))
    assert [end for end, _, _ in comparison.by_position(4)] == [275, 550, 825, 1100]


def test_equal_outputs_change_nothing() -> None:
    rows = torch.randn(40, 9)
    comparison = fidelity(Reader(torch.nn.Identity(), lambda x: x, lambda x: x), rows, rows.clone(), None)
    assert comparison.summary() == {"kl": 0.0, "same top-1": 1.0}


def test_a_language_model_is_read_by_decoder_and_head(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    target = load(str(tmp_path / "model"), "cpu", torch.float32)
    reader = Reader.of(target)
    assert isinstance(reader.module, Prefill)
    (text,) = samples(target, [], 50, "cpu")
    with torch.inference_mode():
        logits = reader.logits(reader.rows(reader.module(*text.args, **text.kwargs)))
        torch.testing.assert_close(logits, target.model(text.ids).logits[0])


def test_haystacks_hold_their_keys_and_questions() -> None:
    tokenizer = Characters()
    one = haystack(tokenizer, 900, (0.5,))
    four = haystack(tokenizer, 1200, (0.0, 0.35, 0.65, 1.0))
    assert one.tokens == 900
    assert four.tokens == 1200
    for hay in (one, four):
        text = tokenizer.decode(hay.ids)
        for question, answer in zip(hay.questions, hay.answers, strict=True):
            assert text.count(tokenizer.decode(answer)) == 2
            assert "pass key" in tokenizer.decode(question)
    assert tokenizer.decode(four.ids).index("red") < tokenizer.decode(four.ids).index("black")


def test_answers_do_not_disturb_each_other() -> None:
    model = tiny_llama(vocab=256)
    hay = haystack(Characters(), 1200, (0.0, 0.35, 0.65, 1.0))
    with torch.inference_mode():
        prefill = model(torch.tensor([hay.ids]), use_cache=True)
        greedy = []
        for question in hay.questions:
            prompt = torch.tensor([[*hay.ids, *question]])
            greedy.append(int(model(prompt).logits[0, -1].argmax()))
    right = [type(hay)(hay.ids, hay.positions, hay.questions, [[token] for token in greedy])]
    assert answered(model, right[0], prefill.past_key_values) == [True] * 4


def test_quality_of_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tiny_llama().save_pretrained(tmp_path / "model")
    args = ["--tokens", "512", "--budget", "1.0", "--budget", "0.2", "--repeats", "1", "--out", str(tmp_path)]
    done = stem_compile("quality", str(tmp_path / "model"), *args, *SHELL)
    assert done.status == 0, done
    written = json.loads((tmp_path / "quality.json").read_text())
    eager, whole, part = written["outcomes"]
    assert eager["texts"]["random tokens, which tell little"]["kl"] == 0
    assert whole["texts"]["random tokens, which tell little"]["kl"] < 1e-4
    assert part["texts"]["random tokens, which tell little"]["kl"] > 1e-6
    assert whole["density"] == 1.0
    assert part["density"] < 0.7
    assert len(part["layers"]) == 2
    assert part["layers"][0] > whole["layers"][0]
    assert "[1/4] eager" in done.err
    page = (tmp_path / "quality.html").read_text()
    assert page.count("<svg") >= 3
    assert "KL against density" in page


def test_quality_takes_factories_and_says_what_it_cannot_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["--tokens", "512", "--budget", "0.2", "--repeats", "1", "--out", str(tmp_path), *SHELL]
    done = stem_compile("quality", "tests.testing.models:plain", *args)
    assert done.status == 0, done
    assert "the target's own inputs" in done.out
    assert stem_compile("quality", "os:getcwd", "--text", "/absent").err.count("\n") == 1
    with pytest.raises(UserError, match="text needs a tokenizer, which a factory does not give"):
        load("tests.testing.models:plain", "cpu", torch.float32).tokenizer()


def test_what_was_finished_is_kept_when_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    real = quality.measure

    def stopped(*args: object) -> object:
        steps = real(*args)  # type: ignore[arg-type]
        for _ in range(2):
            yield next(steps)
        raise KeyboardInterrupt

    monkeypatch.setattr(quality, "measure", stopped)
    args = ["--tokens", "256", "--budget", "0.5", "--repeats", "1", "--out", str(tmp_path), *SHELL]
    done = stem_compile("quality", str(tmp_path / "model"), *args)
    assert done.status == 130
    assert "stopped: 2 of 3 parts are finished" in done.err
    assert "budget 0.5" in done.out
    assert json.loads((tmp_path / "quality.json").read_text())["settings"]["stopped"] is True
