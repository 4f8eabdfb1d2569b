"""How far next-token distributions of a compiled model are from those of the model itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from stem_compile.bench.prefill import CHUNK, Prefill
from stem_compile.bench.speed import first_tensor
from stem_compile.bench.target import Target
from stem_compile.packages import UserError

PROBE = 16
"""Tokens on which the decoder and its head are held against the whole model."""


@dataclass(frozen=True)
class Reader:
    """A model as it is compiled and measured. module: what is called. rows: its output -> [tokens, width]. logits:
    [rows, width] -> [rows, vocabulary], so that no more than ``CHUNK`` rows of logits exist at once."""

    module: torch.nn.Module
    rows: Callable[[Any], torch.Tensor]
    logits: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    @torch.inference_mode()
    def of(cls, target: Target) -> Reader:
        """Decoder and head apart where that is the same model; else the model, whose output are the logits."""
        model: Any = target.model
        if target.checkpoint is not None:
            ids = target.inputs(PROBE)[1]["input_ids"]
            try:
                prefill = Prefill(model).eval()
                _, hidden, _ = prefill(ids)
                apart, whole = prefill.head(hidden), model(input_ids=ids, use_cache=True).logits
            except (AttributeError, TypeError, ValueError):
                pass
            else:
                if apart.shape == whole.shape and torch.allclose(apart, whole, rtol=1e-2, atol=1e-2):
                    return cls(prefill, lambda out: out[1][0], prefill.head)
        return cls(model, lambda out: _matrix(target, out), lambda rows: rows)


def _matrix(target: Target, output: Any) -> torch.Tensor:
    """Logits [tokens, vocabulary] of an output."""
    logits = first_tensor(output)
    if logits.dim() != 3 or logits.shape[0] != 1:
        raise UserError(
            f"{target.name}: fidelity needs logits [1, tokens, vocabulary] from a batch of one, not"
            f" {tuple(logits.shape)}"
        )
    return logits[0]


@dataclass(frozen=True)
class Fidelity:
    """Per position: kl: nats, KL divergence of the distribution from the model's own. same_top1: equal most likely
    token. nll_change: nats, change of the negative log-likelihood of the token that follows (one position less); None
    where there are no tokens. All are fp32 or bool on the CPU."""

    kl: torch.Tensor
    same_top1: torch.Tensor
    nll_change: torch.Tensor | None

    def summary(self) -> dict[str, float]:
        """Means over the second half of the text, where attention is at its sparsest: "kl", "nll change", "same
        top-1"."""
        half = len(self.kl) // 2
        means = {"kl": float(self.kl[half:].mean()), "same top-1": float(self.same_top1[half:].float().mean())}
        if self.nll_change is not None:
            means["nll change"] = float(self.nll_change[half:].mean())
        return means

    def by_position(self, parts: int = 16) -> list[tuple[int, float, float]]:
        """(last position, mean KL, part of equal top-1) of ``parts`` stretches of the text."""
        stretches = [s for s in torch.arange(len(self.kl)).tensor_split(parts) if len(s)]
        return [(int(s[-1]) + 1, float(self.kl[s].mean()), float(self.same_top1[s].float().mean())) for s in stretches]


@torch.inference_mode()
def fidelity(reader: Reader, reference: torch.Tensor, changed: torch.Tensor, ids: torch.Tensor | None) -> Fidelity:
    """reference, changed: [tokens, width], rows of the model itself and of the compiled one. ids: int64 [1, tokens]."""
    kl, same, change = [], [], []
    for start in range(0, len(reference), CHUNK):
        own, other = (
            reader.logits(rows[start : start + CHUNK].to(reference.device)).float().log_softmax(-1)
            for rows in (reference, changed)
        )
        kl.append((own.exp() * (own - other)).sum(-1).clamp(min=0).cpu())
        same.append((own.argmax(-1) == other.argmax(-1)).cpu())
        if ids is not None:
            following = ids[0, start + 1 : start + 1 + len(own), None]
            change.append((own - other)[: len(following)].gather(-1, following)[:, 0].cpu())
    return Fidelity(torch.cat(kl), torch.cat(same), torch.cat(change) if change else None)


def errors_by_layer(target: Target, compile_: Callable[[torch.nn.Module], Any], ids: torch.Tensor) -> list[float]:
    """Relative L2 distance of the hidden states after each layer to the model's own, accumulated over the layers before
    it; empty for a model that does not give its hidden states. ids: int64 [1, tokens]."""
    model: Any = target.model
    if target.checkpoint is None or not hasattr(model, "get_decoder"):
        return []
    layers = _HiddenStates(model.get_decoder()).eval()
    with torch.inference_mode():
        own, other = layers(ids), compile_(layers)(ids)
    return [float((b.float() - a.float()).norm() / a.float().norm()) for a, b in zip(own[1:], other[1:])]


class _HiddenStates(torch.nn.Module):
    def __init__(self, decoder: torch.nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states: tuple[torch.Tensor, ...] = self.decoder(
            input_ids=ids, use_cache=False, output_hidden_states=True
        ).hidden_states
        return states
