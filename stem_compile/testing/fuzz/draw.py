"""The Hypothesis strategy of trials: programs that a model could hold, plain ones first."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import strategies as st

from stem_compile.testing.fuzz import vocabulary as words
from stem_compile.testing.fuzz.program import Attention, Program, Trial

LENGTHS = (70, 17, 40, 63, 64, 65, 100, 127, 128, 129, 131, 193, 257)
"""Queries where everything is computed: block edges, one beyond two blocks of 64 and one beyond 128, primes."""
CHOOSING = (230, 257, 300, 321, 385)
"""Queries where rows have blocks to choose from."""
WIDTHS = (9, 1, 16, 33, 70)
FLEX_CAUSAL = ("le", "ge", "not gt", "difference", "negated", "xor", "twice", "floats", "frames", "shifted")
FLEX_TERMS = (
    *("window", "window by difference", "window by abs", "chunks", "chunks by shift", "stripes"),
    *("sinks and a window", "half", "quarter", "root", "padding", "documents"),
)
FLEX_SCORES = ("softcap", "distance", "decay added", "reciprocal", "sign")
ADDED = ("alibi", "alibi of keys", "alibi in the dtype", "distance", "table", "decay added", "gaussian", "sign")
"""Scores that are a bias, and so may stand in SDPA's mask."""
TWO_DIMENSIONAL = tuple(t for t in words.POSITIONAL)


def trials(inner: str = "eager") -> st.SearchStrategy[Trial]:
    """Trials of one inner compiler. Failures shrink to plain programs of one attention."""
    return _trials(inner)


@st.composite
def _trials(draw: Any, inner: str) -> Trial:
    relation = draw(st.sampled_from(("dense", "dense", "dense", "dense", *words.RELATIONS[1:])))
    program = draw(_programs(relation))
    dense = relation == "dense"
    length = draw(st.sampled_from(LENGTHS if dense else CHOOSING))
    again = draw(st.sampled_from((0, 0, 0, *(n for n in LENGTHS if n != length)))) if dense else 0
    return Trial(
        program=program,
        relation=relation,
        length=length,
        again=again,
        budget=draw(st.sampled_from((0.5, 0.3))),
        inner=inner,
        dynamic=draw(st.sampled_from((False, False, False, False, False, True))),
        seed=draw(st.integers(0, 99)),
    )


@st.composite
def _programs(draw: Any, relation: str) -> Program:
    layout = draw(st.sampled_from(_layouts(relation)))
    flat = layout == "three dimensions"
    heads, key_heads, value_heads = (1, 1, 1) if flat else draw(_heads(relation))
    cache = _cache(draw, relation, flat)
    head_dim = draw(st.sampled_from((16, 8, 24, 32, 64)))
    frame = {"heads": heads, "key_heads": key_heads, "value_heads": value_heads, "cache": cache, "layout": layout}
    number = draw(st.sampled_from((1, 1, 1, 1, 1, 2, 2, 3)))
    attentions = tuple(draw(_attentions(relation, frame)) for _ in range(number))
    if any(a.spelling == "nn.MultiheadAttention" for a in attentions):
        # One module of self-attention: its own projections, nothing around it.
        attentions = attentions[[a.spelling for a in attentions].index("nn.MultiheadAttention") :][:1]
    grids: tuple[str, ...] = ("none", "unsqueeze", "view", "expand", "cumsum", "int32", "strided")
    grids = grids if flat or any(_needs_two(a) for a in attentions) else tuple(words.GRIDS)
    program = Program(
        attentions=attentions,
        grid=draw(st.sampled_from(grids)),
        result=draw(st.sampled_from(words.RESULTS)),
        repeat=draw(st.sampled_from(tuple(words.REPEATS))),
        head_dim=head_dim,
        value_dim=draw(st.sampled_from((head_dim, head_dim, 16, 40)))
        if attentions[0].spelling != "nn.MultiheadAttention"
        else head_dim,
        batch=draw(st.sampled_from((2, 1, 3, 5, 6))),
        past=draw(st.sampled_from((64, 7, 33, 128, 129))) if cache != "none" else 0,
        pads=draw(st.sampled_from(("holes", "left", "right"))),
        dtype=draw(st.sampled_from(("float32", "float32", "float32", "bfloat16", "float16"))),
        **frame,
    )
    return _repaired(program)


def _needs_two(attention: Attention) -> bool:
    """Whether positions have to be two-dimensional, as this spelling broadcasts nothing more."""
    return attention.spelling in ("flex", "nn.MultiheadAttention")


def _layouts(relation: str) -> tuple[str, ...]:
    if relation in ("heads", "groups", "hidden", "chunks"):
        return ("bhnd",)
    return ("bhnd", "bhnd", "bnhd", "fused", "three dimensions")


@st.composite
def _heads(draw: Any, relation: str) -> tuple[int, int, int]:
    if relation == "groups":
        return draw(st.sampled_from(((4, 2, 2), (4, 1, 1), (6, 3, 3))))  # type: ignore[no-any-return]
    pairs: tuple[tuple[int, int, int], ...] = ((2, 2, 2), (1, 1, 1), (4, 2, 2), (4, 1, 1), (6, 2, 2), (3, 3, 3))
    unequal = ((4, 1, 4), (4, 4, 1), (4, 2, 4), (4, 2, 1))
    return draw(st.sampled_from(pairs if relation == "heads" else (*pairs, *unequal)))  # type: ignore[no-any-return]


def _cache(draw: Any, relation: str, flat: bool) -> str:
    if flat or relation in ("groups", "heads"):
        return "none"
    return "prefix" if relation == "chunks" else str(draw(st.sampled_from(("none", "none", "none", *words.CACHES[1:]))))


@st.composite
def _attentions(draw: Any, relation: str, frame: dict[str, Any]) -> Attention:
    spelling = draw(st.sampled_from(_spellings(relation, frame)))
    low = draw(st.sampled_from(tuple(words.LOWS)))
    if spelling == "flex":
        return Attention(
            spelling,
            causal=draw(st.sampled_from(FLEX_CAUSAL)),
            terms=draw(_some(FLEX_TERMS, 2)),
            width=draw(st.sampled_from(WIDTHS)),
            scale=draw(st.sampled_from(("after", "divided"))),
            scores=draw(_some(_meant(FLEX_SCORES, relation), 1)),
        )
    if spelling == "nn.MultiheadAttention":
        return Attention(
            spelling,
            causal=draw(st.sampled_from(tuple(words.CAUSAL))),
            terms=draw(_some(TWO_DIMENSIONAL, 1)),
            width=draw(st.sampled_from(WIDTHS)),
            mask_in_float=draw(st.booleans()),
            fill=draw(st.sampled_from(("masked_fill", "not equal"))),
        )
    scores: tuple[str, ...] = ADDED if spelling == "sdpa with a bias" else tuple(words.SCORES)
    scores = () if spelling == "sdpa" else _meant(scores, relation)
    return Attention(
        spelling,
        causal=draw(st.sampled_from(_meant(tuple(words.CAUSAL), relation))),
        terms=draw(_some(_meant(tuple(words.TERMS), relation), 2)),
        join=draw(st.sampled_from(tuple(words.JOINS))),
        prefix="none" if relation == "shift" else draw(st.sampled_from(("none",) * 4 + tuple(words.PREFIXES))),
        width=draw(st.sampled_from(WIDTHS)),
        mask_in_float=draw(st.booleans()),
        bias=draw(st.sampled_from(tuple(words.BIASES))),
        fill=draw(st.sampled_from(tuple(words.FILLS))),
        low=low,
        scale=draw(st.sampled_from(tuple(words.SCALES))),
        scores=draw(_some(scores, 2)) if scores else (),
        sink=draw(st.sampled_from(("none", "none", "none", *words.SINKS))),
        softmax=draw(st.sampled_from(tuple(words.SOFTMAX))),
    )


def _meant(names: tuple[str, ...], relation: str) -> tuple[str, ...]:
    """Words that mean the same on both sides of a relation."""
    other: dict[str, tuple[str, ...]] = {
        "shift": (*words.ABSOLUTE, *words.SHIFTED),
        "chunks": words.OF_THE_CALL,
        "heads": words.BY_HEAD,
    }
    return tuple(n for n in names if n not in other.get(relation, ()))


def _some(names: tuple[str, ...], most: int) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(names), max_size=most, unique=True).map(tuple)


def _spellings(relation: str, frame: dict[str, Any]) -> tuple[str, ...]:
    flat, heads = frame["layout"] == "three dimensions", frame["heads"]
    equal = frame["key_heads"] == frame["value_heads"]
    names = ["sdpa", "sdpa", "sdpa with a bias", *words.PRODUCTS, "bmm", "baddbmm"]
    if flat:
        return tuple(names)
    if equal and frame["key_heads"] != heads and relation != "groups":
        names += ["grouped einsum"] + (["shared key"] if frame["key_heads"] == 1 else [])
    if equal and relation not in ("shift", "chunks"):
        names.append("flex")
    if (
        equal
        and frame["key_heads"] == heads
        and frame["cache"] == "none"
        and frame["layout"] != "fused"
        and relation in ("dense", "batch")
    ):
        names.append("nn.MultiheadAttention")
    return tuple(names)


def _repaired(program: Program) -> Program:
    """Without what Python, or the model's own arithmetic, would not take."""
    return dataclasses.replace(program, attentions=tuple(_possible(a, program) for a in program.attentions))


def _possible(a: Attention, program: Program) -> Attention:
    changes: dict[str, Any] = {}
    if program.dtype == "float16" and a.low == "billion":
        changes["low"] = "ten thousand"
    if (a.bias in ("multiplied", "subtracted") and a.low == "infinity") or a.spelling == "nn.MultiheadAttention":
        changes["low"] = "infinity" if a.spelling == "nn.MultiheadAttention" else "lowest"
    if program.layout == "three dimensions":
        if a.sink != "none":
            changes["sink"] = "none"
        changes["scores"] = tuple(s for s in a.scores if s not in words.BY_HEAD)
    if a.fill == "in place" and (a.softmax == "exponential" or program.dtype != "float32" or a.scores):
        changes["fill"] = "masked_fill"
    if a.join == "minimum" or (a.join == "where" and any(t in ("given",) for t in a.terms)):
        changes["join"] = "and"
    return dataclasses.replace(a, **changes)
