"""Texts that a model reads when its fidelity is measured, as arguments of one call each."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stem_compile.bench.passkey import documentation
from stem_compile.bench.target import Target
from stem_compile.packages import UserError

WINDOWS = ("documentation, first part", "documentation, second part")
"""Texts that are read where none is given: two windows of the documentation that comes with Python."""


@dataclass(frozen=True)
class Sample:
    """One text. args, kwargs: of the model's call. ids: int64 [1, tokens], what likelihoods are those of; None where
    the model does not read tokens."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ids: torch.Tensor | None

    @property
    def tokens(self) -> int:
        """Length in tokens, 0 where the model does not read tokens."""
        return 0 if self.ids is None else int(self.ids.shape[1])


def samples(target: Target, files: Sequence[Path], tokens: int, device: str) -> list[Sample]:
    """Texts of exactly ``tokens`` tokens: one of each of ``files``, or ``WINDOWS``. Random tokens where the target has
    no tokenizer and no file is given. Raises UserError for a file that is too short or cannot be read."""
    tokenizer = None
    if files:
        tokenizer = target.tokenizer()
    elif target.checkpoint is not None:
        with contextlib.suppress(UserError):
            tokenizer = target.checkpoint.tokenizer()
    if tokenizer is None:
        return [_of_inputs(target, tokens)]
    if files:
        texts = {str(file): _read(file) for file in files}
    else:
        text = documentation()
        texts = dict(zip(WINDOWS, (text[: len(text) // 2], text[len(text) // 2 :])))
    out = []
    for name, text in texts.items():
        ids = torch.tensor([tokenizer(text).input_ids[:tokens]], device=device)
        if ids.shape[1] < tokens:
            raise UserError(f"{name} has {ids.shape[1]:,} tokens: give --tokens {ids.shape[1]} or a longer text")
        out.append(Sample(name, (ids,), {}, ids))
    return out


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {file}: {getattr(error, 'strerror', None) or error}") from None


def _of_inputs(target: Target, tokens: int) -> Sample:
    args, kwargs = target.inputs(tokens)
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    ids = next(
        (x for x in leaves if isinstance(x, torch.Tensor) and x.dtype == torch.int64 and x.shape == (1, tokens)), None
    )
    if target.checkpoint is not None and ids is not None:
        return Sample("random tokens, which tell little", (ids,), {}, ids)
    return Sample("the target's own inputs", args, kwargs, ids)
