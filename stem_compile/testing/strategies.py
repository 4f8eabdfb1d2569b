"""Hypothesis strategies. They draw small records, never tensors: a failure shrinks to a line that one can read and
paste."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st

from stem_compile.algebra.masks import Causal, Mask, Padding, predicate
from stem_compile.algebra.symbolic import KV, FloorDiv, Q
from stem_compile.testing.case import Case, Inputs
from stem_compile.testing.inputs import Source, source_of

SEEDS = st.integers(0, 999)


def seeds(source: Source) -> st.SearchStrategy[int]:
    """Seeds of inputs; few for large models, so that properties share their runs."""
    return st.integers(0, 1) if source.frugal else SEEDS


@st.composite
def cases(
    draw: Any,
    source: Source,
    lengths: Any,
    batches: tuple[int, ...] = (1, 2),
    pad: bool = True,
    pad_step: int = 1,
    wide: bool = True,
    cuts: Any = None,
) -> Case:
    """Cases that ``source`` can make. lengths, cuts: strategies of ints; batches: sizes; pad: whether to pad, left pads
    being whole ``pad_step``s;
    wide: also embeds and explicit positions."""
    if source.strategy is not None:
        return Case(given=draw(source.strategy))
    length = draw(lengths)
    batch = (batches[0] if source.frugal else draw(st.sampled_from(batches))) if "batch" in source.can else 1
    padding, side = 0, "left"
    if pad and "padding" in source.can and length > 1 and draw(st.sampled_from((False, True, True))):
        side = draw(st.sampled_from(("left", "right")))
        step = pad_step if side == "left" else 1
        padding = step * draw(st.integers(0, max(0, (length - 1) // step)))
        if source.frugal and padding and "batch" in source.can:
            batch = 2
    style = draw(st.sampled_from(("ids", "embeds"))) if wide and "embeds" in source.can and not padding else "ids"
    positions = bool(wide and "positions" in source.can and not padding and draw(st.booleans()))
    return Case(
        length, batch, draw(seeds(source)), padding, side, style, positions, draw(cuts) if cuts is not None else 0
    )


@dataclass(frozen=True)
class ModelInputs:
    """Inputs of a model as a record: ``model(*drawn.args, **drawn.kwargs)``. valid: positions that are no padding, None
    for all."""

    case: Case
    source: Source = field(repr=False, compare=False)

    @property
    def inputs(self) -> Inputs:
        """The inputs of the case, drawn anew."""
        return self.source.make(self.case)

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of the model."""
        return self.inputs.args

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of the model."""
        return self.inputs.kwargs

    @property
    def valid(self) -> torch.Tensor | None:
        """Bool [batch, length], positions that are no padding; None where all count."""
        return self.inputs.valid


def model_inputs(
    model: torch.nn.Module, make_inputs: Any = None, max_length: int = 512
) -> st.SearchStrategy[ModelInputs]:
    """Inputs of ``model`` over lengths, batch sizes, paddings, embeddings and positions, as ``ModelInputs``.
    make_inputs: see ``check_model``."""
    source = source_of(model, make_inputs)
    return cases(source, st.integers(1, min(max_length, source.longest))).map(lambda case: ModelInputs(case, source))


@dataclass(frozen=True)
class AttentionInputs:
    """Shapes of one attention. ``tensors()`` gives q [B, H, q_len, d], k [B, Hk, kv_len, d], v [B, Hv, kv_len, dv],
    normal numbers times ``spread``.

    value_heads: Hv, 0 for as many as key heads.
    transposed: memory is [B, length, heads, d], as models have it after splitting heads.
    """

    batch: int = 1
    heads: int = 1
    key_heads: int = 1
    value_heads: int = 0
    q_len: int = 64
    prefix: int = 0
    head_dim: int = 16
    value_dim: int = 16
    spread: float = 1.0
    transposed: bool = False
    seed: int = 0

    @property
    def kv_len(self) -> int:
        """Keys: those of the prefix and those of the queries."""
        return self.prefix + self.q_len

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, q_len, kv_len): what masks are asked about."""
        return self.batch, self.heads, self.q_len, self.kv_len

    def tensors(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k and v; the same ones for the same record."""
        generator = torch.Generator().manual_seed(self.seed)
        sizes = (
            (self.heads, self.q_len, self.head_dim),
            (self.key_heads, self.kv_len, self.head_dim),
            (self.value_heads or self.key_heads, self.kv_len, self.value_dim),
        )

        def drawn(heads: int, length: int, width: int) -> torch.Tensor:
            x = self.spread * torch.randn(self.batch, length, heads, width, generator=generator).transpose(1, 2)
            return (x if self.transposed else x.contiguous()).to(device, dtype)

        q, k, v = (drawn(*s) for s in sizes)
        return q, k, v


def attention_inputs(
    max_length: int = 320, head_dims: tuple[int, ...] = (16, 32, 64), unequal: bool = False
) -> st.SearchStrategy[AttentionInputs]:
    """Shapes of one attention: grouped heads, cached prefixes, ragged lengths, large scores, transposed memory, batches
    of up to 6. unequal: also value heads that are not as many as key heads."""
    groups = st.tuples(st.sampled_from((1, 2, 3)), st.sampled_from((1, 2, 4)))
    return st.builds(
        lambda groups, dims, **rest: AttentionInputs(
            key_heads=groups[0],
            heads=groups[0] * groups[1],
            value_heads=groups[0] * groups[1] if rest.pop("apart") else 0,
            head_dim=dims,
            value_dim=dims if not rest.pop("narrow") else head_dims[0],
            **rest,
        ),
        groups=groups,
        dims=st.sampled_from(head_dims),
        narrow=st.booleans(),
        apart=st.booleans() if unequal else st.just(False),
        batch=st.sampled_from((1, 2, 2, 5, 6)),
        q_len=st.integers(1, max_length),
        prefix=st.one_of(st.just(0), st.integers(1, max_length)),
        spread=st.sampled_from((1.0, 4.0, 12.0)),
        transposed=st.booleans(),
        seed=SEEDS,
    )


def masks(offset: int = 0, padding: bool = True) -> st.SearchStrategy[Mask]:
    """Causal masks of the algebra, alone or with a window, documents of equal length, or padding (mask tensor 0,
    [batch, kv_len])."""
    causal = Causal(offset)
    windows = st.integers(1, 200).map(lambda n: causal & predicate(KV > Q + offset - n))
    documents = st.integers(16, 200).map(lambda n: causal & predicate(_same(FloorDiv(Q + offset, n), FloorDiv(KV, n))))
    plain = st.one_of(st.just(causal), windows, documents)
    return st.one_of(plain, plain.map(lambda m: m & Padding(0))) if padding else plain


def _same(a: Any, b: Any) -> Any:
    import sympy

    return sympy.Eq(a, b)
