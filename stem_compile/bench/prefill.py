"""A causal language model's prefill, and what its outputs are worth: likelihoods of the tokens that follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
