"""Attention problems for kernel tests: small frozen descriptions, so that failures print and shrink to something
readable."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from stem_compile import ops
from stem_compile.algebra.scores import decode as decode_score
from stem_compile.kernels import reference
from stem_compile.selection import Attention, BlockSelection, SelectionSpec
from stem_compile.selection.oam import oam_scores
from stem_compile.selection.tpd import tpd_select

CAUSAL = "kv <= q"
LAST_ROWS = "kv <= q + kv_len - q_len"
SCALAR = "kv <= q + S0"
PADDED = "(kv <= q + S0) & Ne(T0(b, kv), 0)"
WINDOW = "(kv <= q) & (kv > q - 90)"
DOCUMENT = "(kv <= q) & Eq(T0(b, q), T0(b, kv))"
CHUNKED = "(kv <= q) & Eq(FloorDiv(q, 100), FloorDiv(kv, 100))"
LEFT_CHUNKED = "(kv <= q) & Eq(FloorDiv(q - T0(b), 64), FloorDiv(kv - T0(b), 64))"
SHIFTED = "kv <= q + T0()"
PREFIX = "(kv <= q) | (kv < 50)"
GIVEN = "(kv <= q) & Ne(T0(b, 0, q, kv), 0)"
MASKS = (CAUSAL, LAST_ROWS, SCALAR, PADDED, WINDOW, DOCUMENT, CHUNKED, LEFT_CHUNKED, SHIFTED, PREFIX, GIVEN, "True")
EDGED = (
    "(kv <= q) & (kv > q - 333)",
    "(kv <= q) & Eq(FloorDiv(q, 384), FloorDiv(kv, 384))",
    "(kv <= q + 70) & (kv > q - 70)",
    "kv > q - 200",
    "(kv <= q + kv_len - q_len) & (kv > q + kv_len - q_len - 200)",
    "(kv <= q + S0) & (kv > q + S0 - 100) & Ne(T0(b, kv), 0)",
    "(kv <= q + S0) & Eq(FloorDiv(q + S0, 150), FloorDiv(kv, 150)) & (kv > q + S0 - 120)",
    "Eq(FloorDiv(q, 200), FloorDiv(kv, 200))",
)
"""More masks with far edges: alone, together, with padding, without a causal term, under a prefix."""

# "#" is the number of the first tensor that the mask leaves free.
SOFTCAP = "5.0*tanh(0.2*s)"
ALIBI = "s + T#(h)*(kv - q)"
BIAS = "s + T#(0, h, q, kv)"
TEMPERATURE = "s/T#()"
SINK = " ; sink T#(h)"
SCORES = ("", SOFTCAP, ALIBI, BIAS, TEMPERATURE, SINK, SOFTCAP + SINK)

# Weights and outputs are each rounded once to the working type: two half-ulps bound the relative error of a block of
# rows.
TOLERANCE = {torch.bfloat16: 2 * 2.0**-9, torch.float16: 2 * 2.0**-12, torch.float32: 2.0**-18}


@dataclass(frozen=True)
class Case:
    """One attention with a random selection. layout: how q, k and v lie in memory. pad: "left", "right" or "holes"
    under PADDED. kind: of SCORES.

    rise, fall: factors of the first and of the last key; those between lie on a line.
    """

    q_len: int = 300
    kv_len: int = 300
    batch: int = 1
    heads: int = 2
    key_heads: int = 1
    head_dim: int = 32
    value_dim: int = 32
    block_q: int = 128
    block_k: int = 128
    dtype: torch.dtype = torch.float32
    mask: str = CAUSAL
    kind: str = ""
    pad: str = "left"
    layout: str = "bhnd"
    budget: float = 0.4
    pooling: str = "mean"
    metric: str = "paper"
    stride: int = 16
    score_dtype: str = "native"
    prompt_length: int = 0
    rise: float = 1.0
    fall: float = 1.0
    seed: int = 0
    device: str = "cpu"

    @property
    def spec(self) -> SelectionSpec:
        return SelectionSpec(
            budget=self.budget,
            pooling=self.pooling,
            metric=self.metric,
            stride=self.stride,
            block_q=self.block_q,
            block_k=self.block_k,
            sink_blocks=1,
            local_blocks=1,
            prompt_length=self.prompt_length,
            score_dtype=self.score_dtype,
        )

    @property
    def score(self) -> str:
        """``Score.text`` of the case's kind."""
        return decode_score(self.kind.replace("#", str(int("T0" in self.mask)))).text

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.q_len, self.kv_len

    def _tensor(
        self, generator: torch.Generator, heads: int, length: int, dim: int, scale: float = 1.0
    ) -> torch.Tensor:
        x = torch.randn(self.batch, heads, length, dim, generator=generator) * scale
        x = x.to(self.dtype).to(self.device)
        if self.layout == "bnhd":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "sliced":  # a part of a wider row, as in a fused qkv projection
            return torch.cat([x, torch.full_like(x, float("nan"))], -1)[..., :dim]
        return x

    def inputs(self) -> dict[str, Any]:
        """q, k, v, tensors, scalars as the targets take them."""
        generator = torch.Generator().manual_seed(self.seed)
        q = self._tensor(generator, self.heads, self.q_len, self.head_dim)
        k = self._tensor(generator, self.key_heads, self.kv_len, self.head_dim)
        k *= torch.linspace(self.rise, self.fall, self.kv_len, device=self.device)[:, None].to(self.dtype)
        v = self._tensor(generator, self.key_heads, self.kv_len, self.value_dim, 2.0)
        tensors: list[torch.Tensor] = []
        if "Ne(T0(b, kv), 0)" in self.mask:
            position = torch.arange(self.kv_len)
            hidden = torch.randint(0, max(1, self.kv_len // 2), (self.batch, 1), generator=generator)
            visible = {"left": position >= hidden, "right": position < self.kv_len - hidden}
            visible["holes"] = torch.rand(self.batch, self.kv_len, generator=generator) < 0.7
            tensors = [visible[self.pad].to(self.device)]
        if self.mask == DOCUMENT:
            ids = torch.randint(0, 2, (self.batch, max(self.q_len, self.kv_len)), generator=generator)
            tensors = [(ids * (torch.rand(ids.shape, generator=generator) < 0.02)).cumsum(-1).to(self.device)]
        if self.mask == LEFT_CHUNKED:
            tensors = [torch.randint(0, max(1, self.kv_len // 2), (self.batch,), generator=generator).to(self.device)]
        if self.mask == SHIFTED:
            tensors = [torch.tensor(self.kv_len - self.q_len, device=self.device)]
        if self.mask == GIVEN:
            tensors = [(torch.rand(self.batch, 1, self.q_len, self.kv_len, generator=generator) < 0.5).to(self.device)]
        builders = {
            ALIBI: lambda: 0.1 * torch.rand(self.heads, generator=generator),
            BIAS: lambda: torch.randn(1, self.heads, self.q_len, self.kv_len, generator=generator),
            TEMPERATURE: lambda: torch.tensor(2.0),
            SINK: lambda: torch.randn(self.heads, generator=generator),
        }
        tensors += [build().to(self.dtype).to(self.device) for kind, build in builders.items() if kind in self.kind]
        scalars = [self.kv_len - self.q_len] if "S0" in self.mask else []
        return {"q": q, "k": k, "v": v, "tensors": tensors, "scalars": scalars}

    def attention(self, **changes: Any) -> Attention:
        """The attention as the targets take it; changes: fields of it."""
        fields = {"mask_text": self.mask, "scale": self.head_dim**-0.5, "spec_text": self.spec.text()}
        return Attention(**{**self.inputs(), **fields, "score_text": self.score, **changes})

    def random_selection(self, attention: Attention) -> BlockSelection:
        """A valid selection whose scores are noise."""
        candidates = attention.candidates
        noise = torch.rand(
            self.batch, self.heads, *candidates.shape[2:], generator=torch.Generator().manual_seed(self.seed)
        ).to(self.device)
        return tpd_select(noise.masked_fill(~candidates, -torch.inf), self.spec, attention.reach)


def attention_error(case: Case, target: Any, kernel: str, monkeypatch: Any) -> float:
    """Relative error of ``target.attend`` against the fp64 reference, on poisoned memory; also checks rows without
    keys."""
    real = ops.attention_output
    monkeypatch.setattr(ops, "attention_output", lambda q, v: real(q, v).fill_(float("nan")))
    attention = case.attention()
    lists = case.random_selection(attention)
    lse = torch.full(case.shape[:3], float("nan"), device=attention.device)
    out = target.attend(attention, lists, kernel, lse=lse)
    expected = reference.sparse_attention(attention.to(torch.float64), lists)
    assert out.shape == expected.shape and out.dtype == attention.q.dtype
    error = float((out.double() - expected).norm() / expected.norm().clamp(min=1e-30))
    empty = expected.abs().sum(-1) == 0
    said = f"{case}: relative error {error:.2e}; rows wrong: "
    assert (out[empty] == 0).all(), said + places((out != 0).any(-1) & empty) + " (no visible key: must be 0)"
    assert out.isfinite().all(), said + places(~out.isfinite().all(-1)) + " (not finite)"
    blind = (lse == -torch.inf) | bool(attention.score.sink is not None)
    assert blind[empty].all(), said + places(~blind & empty) + " (log-sum-exp without a visible key)"
    assert lse[~empty].isfinite().all(), said + places(~lse.isfinite() & ~empty) + " (log-sum-exp)"
    if case.mask == CAUSAL and not case.kind:
        computed = (
            lists.dense(attention.candidates)
            .repeat_interleave(case.block_q, 2)
            .repeat_interleave(case.block_k, 3)[..., : case.q_len, : case.kv_len]
        )
        exact = attention.to(torch.float64)
        logits = exact.q @ exact.k.repeat_interleave(attention.group, 1).mT * attention.scale
        want = logits.masked_fill(~(computed & torch.ones_like(computed).tril()), -torch.inf).logsumexp(-1)
        assert (lse - want).abs().max() <= 1e-2 + 1e-5 * want.abs().max(), (
            said + places((lse - want).abs() > 1e-2) + " (log-sum-exp)"
        )
    if error >= TOLERANCE[case.dtype]:
        per_row = (out.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-30)
        print(said + places(per_row > 4 * TOLERANCE[case.dtype]))
    return error


def rounded_to_fp8(x: torch.Tensor, block: int) -> torch.Tensor:
    """fp64 values of e4m3 with one fp32 scale for ``block`` tokens of x [B, H, n, d]."""
    blocks = torch.nn.functional.pad(x.float(), (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))
    scale = blocks.abs().amax((-1, -2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 448.0
    return ((blocks / scale).to(torch.float8_e4m3fn).double() * scale.double()).flatten(2, 3)[:, :, : x.shape[2]]


def places(wrong: torch.Tensor) -> str:
    """Where a [B, H, rows] mask is set, for a message."""
    return f"{int(wrong.sum())} of {wrong.numel()}, first (batch, head, row) {wrong.nonzero()[:6].tolist()}"


def selection_gap(case: Case, target: Any) -> tuple[float, bool]:
    """(how far blocks chosen differently are from a tie, in standard deviations of the row's scores; whether counts
    agree)."""
    attention = case.attention(score_text="")
    q, k = attention.q, attention.k
    scored = attention.to(torch.float64)
    if case.score_dtype == "fp8":
        scored = replace(scored, q=rounded_to_fp8(q, case.block_q), k=rounded_to_fp8(k, case.block_k))
    scores = oam_scores(scored)
    expected = tpd_select(scores, case.spec, attention.reach)
    lists = attention.selection(*target.select(attention, target.kernels(attention).select))
    candidates = attention.candidates
    lists.check(candidates)
    mine, theirs = lists.dense(candidates), expected.dense(candidates)
    finite = scores.isfinite()
    spread = torch.where(finite, scores, 0).std(-1).clamp(min=1e-12)
    worst_kept = torch.where(mine & ~theirs, scores, torch.inf).amin(-1)
    best_missed = torch.where(theirs & ~mine, scores, -torch.inf).amax(-1)
    differ = (mine != theirs).any(-1)
    gap = torch.where(differ, (best_missed - worst_kept) / spread, 0.0)
    return float(gap.max()), bool((lists.counts == expected.counts).all())
