"""What runs is told: one line a graph, one warning where a long prompt stays dense, reports of a running model; and
attentions are numbered over the model."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import stem_compile
from stem_compile import Explanation, Reason, StemError, StemWarning, explain, last_report, report, running
from tests.numerics import assert_close

OPTIONS: dict[str, Any] = {"min_length": 1, "budget": 0.4, "inner": "eager"}
N = 700


class Layer(torch.nn.Module):
    """Attention, with a break of the graph behind it."""

    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(32, 96)
        self.broken = broken

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 16).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = (torch.cat([cache, t], 2) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None).transpose(1, 2).reshape(x.shape)
        if self.broken:
            torch._dynamo.graph_break()
        return x + out


class Model(torch.nn.Module):
    """Four layers."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([Layer(broken) for _ in range(4)])

    def forward(self, x: torch.Tensor, cache: torch.Tensor | None = None) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, cache)
        return x


def prompt(length: int = N) -> torch.Tensor:
    return torch.randn(1, length, 32, generator=torch.Generator().manual_seed(length))


def compiled(model: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(model, backend="stem", options={**OPTIONS, **options})


def dense_sites(run: Callable[..., Any], *inputs: Any) -> list[bool]:
    """Which attentions of a call, in order, stay dense."""
    rejected: list[bool] = []
    with torch.no_grad(), running.listen_to_runs(lambda g: rejected.extend(s.decision == "rejected" for s in g.sites)):
        run(*inputs)
    return rejected


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize(
    ("options", "dense"),
    [
        ({"dense_layers": 1}, [True, False, False, False]),
        ({"dense_layers": (1, 3)}, [False, True, False, True]),
        ({"fuel": 2}, [False, False, True, True]),
        ({"fuel": 1, "dense_layers": 1}, [True, False, True, True]),
    ],
    ids=str,
)
def test_attentions_are_numbered_over_the_model(broken: bool, options: dict[str, Any], dense: list[bool]) -> None:
    """A break behind each attention makes all layers share one frame; other lengths compile it anew."""
    model = Model(broken)
    run = compiled(model, **options)
    for length in (N, N, 800, 900):
        assert dense_sites(run, prompt(length)) == dense
    with torch.no_grad():
        dense_run = compiled(model, **{**options, "budget": 1.0})
        assert_close(dense_run(prompt()), model(prompt()))


def test_numbers_begin_anew_with_each_model() -> None:
    options = {**OPTIONS, "dense_layers": 1}
    torch._dynamo.reset()
    for _ in range(2):
        run = torch.compile(Model(True), backend="stem", options=options)
        assert dense_sites(run, prompt()) == [True, False, False, False]


def test_a_shared_frame_runs_under_inductor() -> None:
    model = Model(True)
    run = compiled(model, dense_layers=1, budget=1.0, inner="inductor")
    with torch.no_grad():
        for length in (N, 800):
            assert_close(run(prompt(length)), model(prompt(length)))


def told(run: Callable[..., Any], *inputs: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(*inputs)
        run(*inputs)
    return [str(w.message) for w in caught if issubclass(w.category, StemWarning)]


def test_gradients_are_told_once() -> None:
    (text,) = told(compiled(Model()), prompt())
    assert "gradients are needed: run under torch.no_grad()" in text
    assert "none of 4" in text
    assert "layers.0" in text


def test_gradients_are_told_behind_graph_breaks() -> None:
    (text,) = told(compiled(Model(True)), prompt())
    assert "gradients are needed" in text


def test_decoding_alone_is_told() -> None:
    with torch.no_grad():
        (text,) = told(compiled(Model()), prompt(1), torch.randn(1, 2, N, 16))
    assert "decode steps only" in text
    assert "model.forward = torch.compile(model.forward" in text


def test_decoding_after_a_prefill_is_not() -> None:
    with torch.no_grad():
        run = compiled(Model())
        assert not told(run, prompt())
        assert not told(run, prompt(1), torch.randn(1, 2, N, 16))


def test_refusals_are_told_with_the_change_that_helps() -> None:
    class Dropping(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = x.view(1, -1, 2, 16).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q, dropout_p=0.1, is_causal=True)

    with torch.no_grad():
        (text,) = told(compiled(Dropping()), prompt())
    assert "dropout is active" in text
    assert "model.eval()" in text


@pytest.mark.parametrize(
    ("model", "options", "length"),
    [
        (Model(), {"when_dense": "silent"}, N),
        (Model(), {"min_length": 1000}, N),
        (Model(), {"dense_layers": 4}, N),
        (Model(), {"fuel": 0}, N),
        (torch.nn.Linear(32, 4), {}, N),
        (Model(), {}, 40),
    ],
)
def test_what_was_asked_for_is_not_told(model: torch.nn.Module, options: dict[str, Any], length: int) -> None:
    grad = options.get("when_dense") == "silent" or length == 40
    with torch.set_grad_enabled(grad):
        assert not told(compiled(model, **options), prompt(length))


def test_one_refused_of_many_is_not_told() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        q = x.view(1, -1, 2, 16).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True) + F.scaled_dot_product_attention(q, q, q)

    with torch.no_grad():
        assert not told(compiled(model), prompt())


def test_a_dense_prompt_can_raise() -> None:
    with pytest.raises(StemError, match=r"gradients are needed.*when_dense='error'"):
        compiled(Model(), when_dense="error")(prompt())


def test_the_log_has_one_line_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "stem_compile")

    def lines(run: Callable[..., Any], *inputs: Any) -> list[str]:
        caplog.clear()
        run(*inputs)
        return [r.message for r in caplog.records if r.name == "stem_compile" and r.levelno == logging.INFO]

    with torch.no_grad():
        assert lines(compiled(Model()), prompt()) == ["graph 0: 4 of 4 attentions rewritten"]
        assert lines(compiled(torch.nn.Linear(32, 4)), prompt()) == ["graph 0: no attention"]
        (line,) = lines(compiled(Model(), min_length=1000), prompt())
    assert line.startswith("graph 0: 0 of 4 attentions rewritten; layers.0: prompt is shorter than min_length")


def test_a_running_model_is_reported_without_a_run() -> None:
    with pytest.raises(ValueError, match="has run"):
        running.forget() or last_report()
    model = Model()
    run = compiled(model)
    with pytest.raises(ValueError, match="after a call"):
        report(run)
    with torch.no_grad():
        run(prompt())
        first = report(run)
        run(prompt(900))
        run(prompt(1000))
    assert isinstance(first, Explanation)
    assert [s.name for s in first.sites] == [f"layers.{n}" for n in range(4)]
    assert all(s.decision == "rewritten" and s.density is not None and 0.3 < s.density < 0.9 for s in first.sites)
    second = last_report()
    assert (second.graphs, second.recompilations) == (2, 1)
    assert second.to_dict() == report(run).to_dict()
    assert dense_sites(run, prompt(1100)) == [False] * 4
    assert report(run).graphs == 2


def test_a_compiled_function_is_reported() -> None:
    def attend(q: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    run = compiled(attend)
    with torch.no_grad():
        run(torch.randn(1, 2, N, 16))
    assert [s.decision for s in report(run).sites] == ["rewritten"]
    with pytest.raises(ValueError, match="function"):
        report(attend)


def test_explain_runs_without_gradients_and_says_so() -> None:
    explanation = explain(Model(), OPTIONS)(prompt())
    assert [s.decision for s in explanation.sites] == ["rewritten"] * 4
    assert "without gradients" in str(explanation)
    with torch.inference_mode():
        assert not explain(Model(), OPTIONS)(prompt()).notes


def test_explain_counts_every_call_of_a_shared_frame() -> None:
    explanation = explain(Model(True), OPTIONS)(prompt())
    assert len(explanation.sites) == 4
    assert explanation.breaks
    assert all(s.density is not None for s in explanation.sites)


def test_equal_layers_are_one_line() -> None:
    text = str(explain(Model(), {**OPTIONS, "dense_layers": (1,)})(prompt()))
    assert "layers.0,2-3  rewritten" in text
    assert "layers.1      rejected: dense_layer" in text


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_explain_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    explanation = explain(Model(), {**OPTIONS, "dense_layers": (1,)})(prompt())
    lines = str(explanation).splitlines()
    assert max(map(len, lines)) <= columns
    density = f"{explanation.sites[0].density:.1%}"
    assert any(density in line for line in lines)


def test_a_notebook_shows_a_table() -> None:
    page = explain(Model(), OPTIONS)(prompt())._repr_html_()
    assert "<td>layers.0-3</td>" in page
    assert "&lt;" not in page


def test_graphs_after_each_pass_are_written(tmp_path: Path) -> None:
    explain(Model(), OPTIONS, graphs=tmp_path / "dumps")(prompt())
    files = {f.name: f.read_text() for f in (tmp_path / "dumps").iterdir()}
    assert sorted(files) == [
        f"graph0_{n}_{step}.txt" for n, step in enumerate(("capture", "expand", "insert_selection", "lower", "cleanup"))
    ]
    assert "scaled_dot_product_attention" in files["graph0_0_capture.txt"]
    assert "oam_scores" in files["graph0_2_insert_selection.txt"]
    assert "stem.select" in files["graph0_4_cleanup.txt"]


def test_passes_are_artifacts_of_a_trace(tmp_path: Path) -> None:
    script = (
        "import torch, torch.nn.functional as F\n"
        "with torch.no_grad():\n"
        "    torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), backend='stem',"
        " options={'min_length': 1, 'inner': 'eager'})(torch.randn(1, 2, 200, 16))\n"
    )
    import os

    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "TORCH_TRACE": str(tmp_path)})
    trace = "".join(f.read_text() for f in tmp_path.iterdir())
    assert all(f"stem_after_{step}" in trace for step in ("capture", "insert_selection", "lower", "cleanup"))


def test_public_names() -> None:
    assert {"Explanation", "OptionError", "Reason", "Site", "StemError", "StemWarning"} <= set(dir(stem_compile))
    assert not [name for name in dir(stem_compile) if name.startswith("_") and not name.startswith("__")]
    assert all(getattr(stem_compile, name) is not None for name in stem_compile.__all__)
    assert stem_compile.Reason.MASK is Reason.MASK
