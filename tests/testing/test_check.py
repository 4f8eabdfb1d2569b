"""``check_model``: verdicts, reports as text, JSON and HTML, the command line and the pytest plugin."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from stem_compile.config import StemConfig
from stem_compile.testing import Case, Report, Violation, check_case, check_model
from stem_compile.testing.html import page
from stem_compile.testing.inputs import NoInputs
from stem_compile.testing.plugin import options_from
from stem_compile.testing.properties import shapes
from tests.commandline import stem_compile
from tests.testing.factories import between_graphs, broken, no_fp64, not_a_number, unsteady
from tests.testing.faults import FAULTS, Fault
from tests.testing.models import Plain, encoder, plain, transformer

CHEAP = ["kernel-exactness", "coverage", "budget"]
ROOT = Path(__file__).parents[2]


def _dropping() -> Fault:
    return next(f for f in FAULTS if f.name == "the last selected block is dropped")


@pytest.fixture(scope="module")
def failing() -> Report:
    """The report on a model whose kernel drops a block."""
    with _dropping().planted():
        return check_model(plain(), options={"budget": 0.4}, properties=CHEAP, max_examples=4)


def test_a_transformer_passes() -> None:
    report = check_model(transformer("llama"), properties=CHEAP, max_examples=2)
    assert report.passed, report
    assert report.verdict == "PASS: 3 properties hold over 6 examples."
    assert [r.facts.get("rewritten") for r in report.results] == [None, 2.0, None]


def test_a_plain_module_passes_and_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    report = check_model(plain(), properties=CHEAP, max_examples=2, progress=lambda *step: told.append(step))
    assert report.passed, report
    assert told == [(name, done, 2) for name in CHEAP for done in (1, 2)]


def test_an_encoder_that_stays_dense_is_reported_or_expected() -> None:
    silent = check_model(encoder(), properties=["dense-equivalence", "coverage"], max_examples=1)
    assert [r.name for r in silent.failures] == ["coverage"]
    assert "layers.0: no causal mask" in str(silent)
    assert "expected=0 if that is meant" in str(silent)
    stated = check_model(
        encoder(), properties=["dense-equivalence", "coverage", "batch-invariance"], max_examples=1, expected=0
    )
    assert [r.verdict for r in stated.results] == ["pass", "pass", "not applicable"], stated


def test_inputs_come_from_a_function_an_example_or_a_strategy() -> None:
    example = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    strategy = st.integers(700, 900).map(lambda n: (torch.arange(n)[None] % 50,))
    for given in (
        lambda batch, length, seed: {"tokens": torch.arange(batch * length).view(batch, length) % 50},
        example,
        strategy,
    ):
        assert check_model(plain(), given, properties=["coverage"], max_examples=1).passed
    with pytest.raises(NoInputs, match="make_inputs"):
        check_model(torch.nn.Bilinear(4, 4, 4))


def test_wrong_arguments_name_the_right_ones() -> None:
    with pytest.raises(ValueError, match="unknown property 'budgets'; properties: dense-equivalence"):
        check_model(plain(), properties=["budgets"])
    with pytest.raises(ValueError, match="did you mean 'budget'"):
        check_model(plain(), options={"budgt": 0.5})


def test_the_same_seed_gives_the_same_examples(failing: Report) -> None:
    with _dropping().planted():
        again = check_model(plain(), options={"budget": 0.4}, properties=["kernel-exactness"], max_examples=4)
    assert failing.results[0].failure is not None
    assert again.results[0].failure is not None
    assert again.results[0].failure.case == failing.results[0].failure.case


def test_a_failure_is_readable_and_its_snippet_fails_again(failing: Report) -> None:
    with pytest.raises(Violation) as caught:
        failing.raise_for_failures()
    message = str(caught.value)
    assert "kernel-exactness does not hold (equals dense attention under the selected blocks)" in message
    assert "times the tolerance) at batch row 0, position" in message
    assert "seed 0" in message
    (result,) = failing.failures
    snippet = failing.snippet(result)
    assert "Case(length=" in snippet
    assert snippet.splitlines()[-1] == ")"
    with _dropping().planted(), pytest.raises(Violation, match="not that of the selected blocks"):
        exec(snippet, {"model": plain()})


def test_a_case_holds_alone() -> None:
    assert check_case(plain(), "dense-equivalence", Case(length=70, batch=2, seed=3)).worst < 1


def test_a_report_is_json_and_html(failing: Report, tmp_path: Path) -> None:
    for name in ("report.json", "report.html"):
        failing.write(tmp_path / name)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["passed"] is False
    assert [r["name"] for r in written["results"]] == CHEAP
    assert written["results"][0]["failure"]["snippet"] == failing.snippet(failing.failures[0])
    assert written["settings"]["seed"] == 0
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("<tr>") == 1 + len(CHEAP)
    assert '<td class="fail">fail</td>' in page
    assert "Case(length=" in page


def test_bounds_make_fidelity_a_test() -> None:
    text = torch.randint(0, 50, (1, 900), generator=torch.Generator().manual_seed(0))
    bounded = check_model(
        _takes_ids(), lambda batch, length, seed: text, properties=["fidelity"], text=text, bounds={"top-1": 1.01}
    )
    assert not bounded.passed
    assert "top-1 is" in str(bounded)


def _takes_ids() -> torch.nn.Module:
    class Named(Plain):
        def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
            return super().forward(input_ids)

    torch.manual_seed(0)
    return Named().eval()


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (not_a_number, "the model's own output in fp64 is NaN at batch row 0, position 0"),
        (no_fp64, "the model does not run in fp64"),
    ],
)
def test_nothing_passes_that_was_compared_with_nothing(model: Any, why: str) -> None:
    report = check_model(model(), lambda batch, length, seed: torch.full((batch, length), seed % 50), max_examples=1)
    assert not report.passed
    assert not report.failures, report
    assert report.verdict.startswith(f"NOT PROVEN: neither dense-equivalence nor kernel-exactness applies ({why}")
    with pytest.raises(Violation, match="NOT PROVEN"):
        report.raise_for_failures()


@pytest.mark.parametrize(
    ("model", "name", "why"),
    [
        (unsteady, "half-precision", "the model itself is unsteady in bfloat16"),
        (between_graphs, "kernel-exactness", "the model does not run in fp64, .* graph by graph: RuntimeError"),
    ],
)
def test_what_the_model_itself_does_is_no_failure_of_ours(model: Any, name: str, why: str) -> None:
    report = check_model(model(), properties=["dense-equivalence", name], max_examples=1)
    first, second = report.results
    assert first.verdict == "pass", report
    assert second.verdict == "not applicable", report
    assert re.search(why, second.reason)


def test_a_length_at_which_the_model_itself_fails_is_none_of_ours() -> None:
    report = check_model(broken(), properties=["shape-robustness"])
    assert [(r.verdict, r.reason) for r in report.results] == [
        ("not applicable", "the model itself raises RuntimeError: broken by design")
    ]

    class Longer(Plain):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            if tokens.shape[1] < 2:
                raise ValueError("too short")
            return super().forward(tokens)

    (result,) = check_model(Longer().eval(), properties=["shape-robustness"]).results
    # All but the one of a single token.
    assert (result.verdict, result.facts["lengths"]) == ("pass", len(shapes.lengths(64)) - 1), result


def test_a_snippet_says_all_that_the_check_was_given() -> None:
    lengths = st.integers(700, 900).map(lambda n: torch.arange(n)[None] % 50)
    report = check_model(
        encoder(), st.builds(lambda: torch.ones(1, 700, 64)), properties=["coverage"], max_examples=2, expected=1
    )
    (failed,) = report.failures
    assert (
        report.snippet(failed).splitlines()[-1]
        == "check_model(model, make_inputs, options={}, properties=['coverage'], expected=1, max_examples=2,"
        " seed=0).raise_for_failures()"
    )
    alone = check_model(encoder(), properties=["coverage"], max_examples=1, expected=1)
    assert "expected=1" in alone.snippet(alone.failures[0])
    bounded = check_model(plain(), lengths, properties=["fidelity"], max_examples=1, bounds={"top-1": 1.01})
    assert "bounds={'top-1': 1.01}" in bounded.snippet(bounded.failures[0])


def test_a_missing_hypothesis_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(ImportError, match=r"package 'hypothesis' is missing: pip install 'stem-compile\[check\]'"):
        check_model(plain())


# -- the command line
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factory", "status"),
    [("models:plain", 0), ("factories:pair", 0), ("factories:with_example", 0), ("models:encoder", 3)],
)
def test_the_exit_status_is_the_verdict(factory: str, status: int, tmp_path: Path) -> None:

    arguments = [
        "check",
        f"tests.testing.{factory}",
        "-p",
        "coverage",
        "--examples",
        "1",
        "--html",
        str(tmp_path / "report.html"),
    ]
    done = stem_compile(*arguments)
    assert done.status == status, done.out
    assert ("PASS: 1 property holds" if status == 0 else "FAIL: coverage") in done.out
    assert (tmp_path / "report.html").exists()


def test_a_folder_with_a_config_alone_gets_random_weights(tmp_path: Path) -> None:

    transformer("qwen3").config.save_pretrained(tmp_path)
    done = stem_compile("check", str(tmp_path), "-p", "coverage", "--examples", "1")
    assert done.status == 0, done.out
    assert "PASS: 1 property holds over 1 example." in done.out
    assert "random weights" in " ".join(done.out.split())


def test_a_limit_of_time_is_told() -> None:
    report = check_model(plain(), properties=CHEAP, max_examples=3, seconds=0)
    assert report.passed
    assert [r.tried for r in report.results] == ["1 of 3"] * 3
    assert report.verdict == "PASS: 3 properties hold over 3 examples; 3 cut short by the time limit."


def test_json_is_all_that_is_printed() -> None:

    done = stem_compile("check", "tests.testing.models:plain", "-p", "coverage", "--examples", "1", "--json")
    assert json.loads(done.out)["passed"] is True


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tests.testing.models:absent"], "no attribute 'absent'"),
        (["tests.testing.factories:nothing"], "gave a int: it must give a torch.nn.Module"),
        (["tests.testing.models:plain", "-p", "budgets"], "unknown property 'budgets'"),
    ],
)
def test_mistakes_can_be_mended(arguments: list[str], said: str) -> None:

    done = stem_compile("check", *arguments)
    assert done.status == 1
    assert said in done.err
    assert len(done.err.splitlines()) == 1


def test_a_model_that_fails_by_itself_checks_nothing() -> None:

    done = stem_compile("check", "tests.testing.factories:broken", "-p", "dense-equivalence", "--examples", "1")
    assert done.status == 3
    assert "NOTHING CHECKED" in done.out
    assert "the model itself raises RuntimeError: broken by design" in " ".join(done.out.split())


# -- the pytest plugin
# -----------------------------------------------------------------------------------------------------

PLUGIN_TEST = """
import pytest
from tests.testing.models import encoder, plain

@pytest.mark.stem(properties=["coverage"], max_examples=1, options={"sink_blocks": 0})
def test_passes(stem_check):
    report = stem_check(plain())
    assert report.settings["options"]["budget"] == 0.4
    assert report.settings["options"]["sink_blocks"] == 0
    assert report.settings["seed"] == 7

def test_fails(stem_check):
    stem_check(encoder(), properties=["coverage"], max_examples=1)
"""


def test_the_plugin_gives_marks_options_and_a_fixture(tmp_path: Path) -> None:
    (tmp_path / "test_user.py").write_text(PLUGIN_TEST)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--strict-markers",
        "-p",
        "no:cacheprovider",
        f"--rootdir={tmp_path}",
        str(tmp_path),
    ]
    typed = ["--stem-options", "budget=0.4,sink_blocks=1", "--stem-seed", "7"]
    done = subprocess.run([*command, *typed], capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "FAIL: coverage." in done.stdout


def test_options_of_pytests_command_line() -> None:
    assert options_from("budget=0.25, pooling=max,") == {"budget": 0.25, "pooling": "max"}
    assert options_from("dense_layers=(0, 2),mu=1") == {"dense_layers": (0, 2), "mu": 1}
    assert options_from("") == {}
    for text, said in (
        ("budgt=0.4", "did you mean 'budget'"),
        ("budget", "write NAME=VALUE"),
        ("mu=1,budget", "write NAME=VALUE"),
    ):
        with pytest.raises(pytest.UsageError, match=said):
            options_from(text)


def test_as_deployed_changes_no_option() -> None:
    options = {"budget": 0.5, "inner": "aot_eager"}
    report = check_model(plain(), options=options, as_deployed=True, properties=["kernel-exactness", "coverage"])
    assert report.passed, report
    assert report.settings["options"] == dataclasses.asdict(StemConfig(budget=0.5, inner="aot_eager"))
    assert "As deployed: blocks of 128 and inner='aot_eager'" in str(report)
    assert "budget=0.5, inner=aot_eager, seed" in report.headline
    assert {r.examples for r in report.results} <= {1, 2}
    small = check_model(plain(), properties=["coverage"], max_examples=1)
    assert "Small blocks (64) and inner='eager'" in str(small)
    assert "--as-deployed" in small.conditions


def test_a_snippet_checks_as_deployed() -> None:
    planted = next(f for f in FAULTS if f.name == "the last selected block is dropped")
    with planted.planted():
        report = check_model(
            plain(), options={"budget": 0.5, "inner": "eager"}, as_deployed=True, properties=["kernel-exactness"]
        )
    (failed,) = report.failures
    snippet = report.snippet(failed)
    assert "options={'budget': 0.5, 'inner': 'eager'}" in snippet
    assert "as_deployed=True" in snippet
    with planted.planted(), pytest.raises(Violation):
        exec(snippet, {"model": plain()})
    exec(snippet, {"model": plain()})


def test_profiles_differ_in_examples() -> None:
    ci = check_model(plain(), properties=["coverage"])
    thorough = check_model(plain(), properties=["coverage"], profile="thorough")
    assert thorough.results[0].examples == 5 * ci.results[0].examples
    with pytest.raises(ValueError, match="unknown profile 'night'; profiles: ci, thorough"):
        check_model(plain(), profile="night")


def test_the_last_failure_is_tried_first(tmp_path: Path) -> None:
    def check() -> Report:
        return check_model(plain(), options={"budget": 0.4}, properties=["batch-invariance"], database=tmp_path)

    planted = next(f for f in FAULTS if f.name == "block scores averaged over the batch")
    with planted.planted():
        first = check().failures[0].failure
        again = check().failures[0].failure
    assert first is not None
    assert again is not None
    assert (again.case, again.needed) == (first.case, 1)
    assert check().passed
    # What holds again is forgotten; what cannot be read is no failure.
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text()) == {}
    file.write_text("no JSON")
    assert check().passed


def test_a_page_fits_a_phone_and_says_when(failing: Report) -> None:
    failing.settings |= {"machine": "a machine", "versions": {"torch": torch.__version__, "triton": None}}
    text = page(failing.to_dict())
    for words in ("@media (max-width: 40rem)", "a machine", torch.__version__, "not installed", "seconds"):
        assert words in text
    assert "th { overflow-wrap: normal }" in text  # headings are not cut inside a word
    assert failing.settings["date"] in text
    assert "<script" not in text
