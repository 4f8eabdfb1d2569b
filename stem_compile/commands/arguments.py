"""Arguments that several commands take, and what is checked of them before any work begins."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stem_compile.packages import MissingPackage, UserError

if TYPE_CHECKING:
    import torch

TARGET = (
    "a folder, a .gguf file or an id of transformers; or package.module:factory, where factory() gives a model or"
    " (model, inputs), and factory(tokens) gives (model, args) or (model, args, kwargs)"
)
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def add_target(parser: argparse.ArgumentParser) -> None:
    """TARGET and where it runs."""
    parser.add_argument("target", metavar="TARGET", help=TARGET)
    add_place(parser)


def add_place(parser: argparse.ArgumentParser) -> None:
    """--device, --dtype and --option."""
    parser.add_argument(
        "--device", default="", metavar="DEVICE", help="cpu or cuda (default: a GPU where there is one)"
    )
    parser.add_argument(
        "--dtype",
        default="",
        metavar="DTYPE",
        help="float32, bfloat16 or float16 (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument(
        "-o",
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="option of the backend, such as budget=0.25, or @FILE with options as JSON, as tune writes it; may be"
        " repeated",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def add_tokens(parser: argparse.ArgumentParser, default: str, repeated: bool = False) -> None:
    """--tokens N, which may be repeated."""
    parser.add_argument(
        "--tokens",
        type=at_least(1),
        action="append" if repeated else "store",
        metavar="N",
        help=f"length of the prompt{'; may be repeated' if repeated else ''} (default: {default})",
    )


def at_least(low: float, kind: type = int, above: bool = False) -> Callable[[str], Any]:
    """Argument type: a number of ``kind`` that is at least, or strictly above, ``low``."""
    word = {int: "a whole number", float: "a number"}[kind]
    limit = f"above {low:g}" if above else f"of at least {low:g}"

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        # Not <, since NaN is no number either.
        if value is None or not (value > low if above else value >= low):
            raise argparse.ArgumentTypeError(f"{text!r}: {word} {limit}")
        return value

    return read


def backend_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Options of the backend from NAME=VALUE texts and @FILE, later ones winning. Raises UserError for a wrong name or
    value."""
    from stem_compile.config import OptionError, StemConfig, written_options

    options: dict[str, Any] = {}
    try:
        for pair in pairs:
            options |= _options_of_file(Path(pair[1:])) if pair.startswith("@") else written_options([pair])
        StemConfig.from_options(options)
    except OptionError as error:
        raise UserError(f"--option {error}") from None
    return options


def _options_of_file(file: Path) -> dict[str, Any]:
    try:
        options = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"--option @{file}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--option @{file}: no JSON: {error}") from None
    if not isinstance(options, dict):
        raise UserError(f'--option @{file}: JSON of an object such as {{"budget": 0.25}}')
    return options


def place(arguments: argparse.Namespace) -> tuple[str, torch.dtype]:
    """(device, dtype) asked for. Raises UserError."""
    import torch

    from stem_compile.bench.checkpoint import default_device, default_dtype

    device = arguments.device or default_device()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {arguments.device!r}: {str(error).splitlines()[0]}") from None
    known = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    if arguments.dtype and arguments.dtype not in known:
        raise UserError(f"--dtype {arguments.dtype!r}: one of {', '.join(known)}")
    return device, known[arguments.dtype] if arguments.dtype else default_dtype(device)


def writable_folder(path: Path, option: str) -> None:
    """Create the folder ``path``. Raises UserError at once, not after minutes of work whose result has no place."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}") from None
    writable_file(path / f".stem-compile-{os.getpid()}", option, path)


def writable_file(path: Path, option: str, shown: Path | None = None) -> None:
    """Raise UserError unless the file ``path`` can be written; its folder is created. shown: the path to name."""
    if shown is None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{option} {path}: {error.strerror}") from None
    existed = path.exists()
    try:
        with path.open("a"):
            pass
    except OSError as error:
        raise UserError(f"{option} {shown or path}: {error.strerror}") from None
    if not existed:
        path.unlink()


def add_out(parser: argparse.ArgumentParser, what: str) -> None:
    """--out, the folder of a command's files."""
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder for {what} (default: out)")


def out_folder(arguments: argparse.Namespace) -> tuple[Path, str]:
    """(folder, remark). remark: what to install for the charts and the page where they were not asked for and cannot be
    made; empty where they can. Raises MissingPackage where ``--out`` asks for them, UserError where nothing can be
    written."""
    missing = [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing and arguments.out is not None:
        raise MissingPackage(*missing)
    folder = arguments.out or Path("out")
    writable_folder(folder, "--out")
    return folder, f"for the charts and the page: {MissingPackage(*missing)}" if missing else ""
