"""What happens to an attention's scores between the product and the softmax: softcap, position biases, learned scales,
sink logits.

A ``Score`` is a real expression in ``SCORE`` (the scaled product q.k) and in the symbols of masks, plus the logit of a
sink where there is one. Like a mask it travels as text, is evaluated in torch by the oracle and printed into the
kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch

from stem_compile.algebra import symbolic, text
from stem_compile.algebra.masks import environment
from stem_compile.algebra.symbolic import KV, SCORE, B, H, Q

SEPARATOR = " ; sink "


@dataclass(frozen=True)
class Score:
    """expr: the score that enters the softmax, real, in ``SCORE, B, H, Q, KV``. sink: logit joined to every row's
    softmax and dropped after it, or None.

    Block scores (``oam.py``) see ``expr`` where it depends on positions, read at a block pair's last query and last
    key, so that a bias ranks blocks as it ranks keys. A softcap is monotone and a sink is the same for all keys of a
    row: neither would change a ranking.
    """

    expr: Any = SCORE
    sink: Any = None

    @property
    def text(self) -> str:
        """Canonical text, "" for a plain score; ``decode``'s inverse. Raises OutsideAlgebra (a TypeError) where a
        function is not in the table."""
        expr = "" if self.expr == SCORE else text.encode(self.expr)
        return expr + (f"{SEPARATOR}{text.encode(self.sink)}" if self.sink is not None else "")

    @property
    def modified(self) -> bool:
        """Whether ``expr`` is more than the scaled product."""
        return bool(self.expr != SCORE)

    @property
    def positional(self) -> bool:
        """Whether block scores see it: it depends on positions or on tensors."""
        return bool(self.expr.free_symbols - {SCORE}) or any(
            symbolic.load_index(f) is not None for f in self.expr.atoms(sympy.core.function.AppliedUndef)
        )

    @property
    def words(self) -> str:
        """The score as a model author would say it; "" for a plain one."""
        parts = []
        caps = [c for c in self.expr.atoms(sympy.tanh) if c.has(SCORE)]
        if caps:
            # A scale by position stands inside the cap, whose own size is then no number.
            inverse = caps[0].args[0].coeff(SCORE)
            parts.append(f"softcap {float(1 / inverse):g}" if inverse.is_number and inverse != 0 else "softcap")
        if self.positional:
            rest = symbolic.expand(self.expr - SCORE)
            loads = {f for f in self.expr.atoms(sympy.core.function.AppliedUndef) if symbolic.load_index(f) is not None}
            if not rest.has(SCORE) and rest.has(KV) and not any({Q, KV} & f.free_symbols for f in loads):
                parts.append("position bias linear in the distance")
            elif any(KV in f.free_symbols for f in loads):
                parts.append("bias from a tensor")
            else:
                parts.append("learned scale")
        if self.sink is not None:
            parts.append("sink")
        return ", ".join(parts)

    def apply(self, scores: torch.Tensor, env: dict[Any, Any]) -> torch.Tensor:
        """``expr`` of scaled products; ``env`` binds the positions, lengths, scalars and tensors that it reads."""
        if not self.modified:
            return scores
        value = symbolic.evaluate(self.expr, env | {SCORE: scores})
        return torch.as_tensor(value, device=scores.device).to(scores.dtype).expand(scores.shape)

    def sink_logits(
        self, shape: Sequence[int], tensors: Sequence[torch.Tensor], scalars: Sequence[int], like: torch.Tensor
    ) -> torch.Tensor | None:
        """Sink logit of each row, in ``like``'s dtype, broadcastable to [B, H, q_len, 1]; None without a sink."""
        if self.sink is None:
            return None
        env = environment((shape[0], shape[1], shape[2], shape[3]), tensors, scalars)
        places = ((B, shape[0], (-1, 1, 1, 1)), (H, shape[1], (1, -1, 1, 1)), (Q, shape[2], (1, 1, -1, 1)))
        env |= {s: torch.arange(n, device=like.device).view(*at) for s, n, at in places}
        value = torch.as_tensor(symbolic.evaluate(self.sink, env), device=like.device)
        return value.to(like.dtype).expand(*value.shape, *(1,) * (4 - value.dim()))


@functools.lru_cache(maxsize=1024)
def decode(encoded: str) -> Score:
    """Score of ``Score.text``. Raises ValueError for anything else."""
    expr, _, sink = encoded.partition(SEPARATOR)
    try:
        return Score(text.decode(expr) if expr else SCORE, text.decode(sink) if sink else None)
    except ValueError as error:
        raise ValueError(f"not an encoded score: {encoded!r} ({error})") from error


def block_positions(
    rows: int, columns: int, shape: Sequence[int], block_q: int, block_k: int, device: torch.device
) -> dict[Any, torch.Tensor]:
    """Bindings under which a positional score is read for block pairs: their last query and last key, [1, 1, rows, 1]
    and [1, 1, 1, columns]."""
    last_q = (torch.arange(1, rows + 1, device=device) * block_q).clamp(max=shape[2]) - 1
    last_k = (torch.arange(1, columns + 1, device=device) * block_k).clamp(max=shape[3]) - 1
    batch, heads = (torch.arange(n, device=device) for n in shape[:2])
    return {
        B: batch.view(-1, 1, 1, 1),
        H: heads.view(1, -1, 1, 1),
        Q: last_q.view(1, 1, -1, 1),
        KV: last_k.view(1, 1, 1, -1),
    }
