"""Measure one prefill: time to first token, peak memory, and what the outputs are worth."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CHUNK = 512
"""Rows of logits that exist at once: 8,192 x 49,152 logits in fp32 would be 1.6 GB."""


class Prefill(torch.nn.Module):
    """A causal language model's prefill: (logits of the last token, final hidden states of all tokens, cache).

    The hidden states cost nothing and let quality be scored from the very run that was timed.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder, self.head = model.get_decoder(), model.get_output_embeddings()

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """ids: int64 [1, tokens]."""
        out = self.decoder(input_ids=ids, use_cache=True)
        return self.head(out.last_hidden_state[:, -1:]), out.last_hidden_state, out.past_key_values


@dataclass(frozen=True)
class Run:
    """seconds: wall time. peak_bytes: memory above what was held before, at its highest; None where it cannot be known.
    output: the result."""

    seconds: float
    peak_bytes: int | None
    output: Any


def run(device: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Run:
    """Call ``function(*args, **kwargs)`` once, under inference mode, on a quiet heap."""
    gc.collect()
    cuda = torch.device(device).type == "cuda"
    before = _start_cuda() if cuda else _start_cpu()
    start = time.perf_counter()
    with torch.inference_mode():
        output = function(*args, **kwargs)
        if cuda:
            torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if cuda else _status("VmHWM")
    return Run(seconds, None if before is None or peak is None else max(peak - before, 0), output)


def _start_cuda() -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _start_cpu() -> int | None:
    """Give freed memory back, set the kernel's high-water mark to the present, and return the present. None where there
    is no such mark."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    return _status("VmRSS")


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


@dataclass(frozen=True)
class Predictions:
    """nll: fp32 [tokens - 1], nats a token. top1: int64 [tokens - 1], most likely next tokens."""

    nll: torch.Tensor
    top1: torch.Tensor


@torch.inference_mode()
def predictions(hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor) -> Predictions:
    """Score hidden states [1, tokens, width] of ``ids`` [1, tokens] against the tokens that follow, ``CHUNK`` rows at a
    time."""
    nll, top1 = [], []
    for rows, targets in zip(hidden[0, :-1].split(CHUNK), ids[0, 1:].split(CHUNK), strict=True):
        logits = head(rows).float()
        nll.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none").cpu())
        top1.append(logits.argmax(-1).cpu())
    return Predictions(torch.cat(nll), torch.cat(top1))


@torch.inference_mode()
def greedy(model: Any, logits: torch.Tensor, cache: Any, steps: int) -> list[int]:
    """``steps`` greedy tokens after a prefill, decoded by the plain model on the prefill's cache. logits: those of the
    last token."""
    tokens = [int(logits[0, -1].argmax())]
    while len(tokens) < steps:
        out = model(input_ids=torch.tensor([tokens[-1:]], device=logits.device), past_key_values=cache, use_cache=True)
        tokens.append(int(out.logits[0, -1].argmax()))
    return tokens
