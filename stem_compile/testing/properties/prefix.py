"""Prefix invariance: a prompt prefilled in chunks with a cache gives what it gives in one shot.

Servers prefill long prompts in chunks; kernels that take the query's offset wrong, or budgets that follow the chunk
instead of the prompt, shift what is read. With the full length declared (``prompt_length``) and chunks of whole query
blocks, every chunk must select what one shot selects (up to ties) and give the same outputs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from stem_compile.testing import numerics
from stem_compile.testing.agreement import dense_of, forced
from stem_compile.testing.case import Case, Inputs, packed
from stem_compile.testing.inputs import CACHES
from stem_compile.testing.subject import Subject
from stem_compile.testing.traced import primary
from stem_compile.testing.violation import Inapplicable, Measure, require

NAME = "prefix-invariance"
TITLE = "chunks with a cache equal one shot"
ORDER = 9
EXAMPLES = 6
FEWEST = 16
"""Fewer queries behind a prefix are decoding, which stays dense."""


def cases(subject: Subject) -> Any:
    """Strategy of the examples to try. Raises Inapplicable where the property says nothing about the subject."""
    from hypothesis import strategies as st

    from stem_compile.testing.lengths import sparse
    from stem_compile.testing.strategies import seeds

    if "cache" not in subject.source.can:
        raise Inapplicable("the model takes no cache of keys and values")
    if subject.expected == 0:
        raise Inapplicable("no attention is expected to be rewritten")
    # Every chunk of a large model takes its weights through the processor once more.
    chunks = st.integers(*((4, 5) if subject.large else (1, 3))).map(lambda n: n * subject.block)
    batch = 1 if subject.large else 2
    drawn = st.builds(
        lambda n, chunk, seed: Case(n, batch, seed, cut=chunk), sparse(subject), chunks, seeds(subject.source)
    )
    return drawn.filter(lambda case: case.length % case.cut == 0 or case.length % case.cut >= FEWEST)


def _chunk(inputs: Inputs, start: int, stop: int, name: str, cache: Any) -> Inputs:
    kwargs = {
        k: packed(v[:, start:stop]) if isinstance(v, torch.Tensor) and v.dim() > 1 else v
        for k, v in inputs.kwargs.items()
    }
    return Inputs((), kwargs | {"use_cache": True} | ({name: cache} if cache is not None else {}))


def _cache_of(result: Any) -> Any:
    """The cache that a model returns; None without one."""
    return next((cache for name in CACHES if (cache := getattr(result, name, None)) is not None), None)


def _chunked_golden(subject: Subject, inputs: Inputs, case: Case) -> torch.Tensor:
    """The model itself, in its own dtype, chunk by chunk."""
    outputs, cache = [], None
    with torch.no_grad():
        for start in range(0, case.length, case.cut):
            part = _chunk(inputs, start, min(start + case.cut, case.length), subject.source.cache, cache)
            result = subject.model(**part.kwargs)
            cache = _cache_of(result)
            if cache is None:
                raise Inapplicable("the model returns no cache")
            outputs.append(primary(result))
    return torch.cat(outputs, 1)


def check(subject: Subject, case: Case) -> Measure:
    """Whether the property holds on one example: how close it came to failing. Raises Violation where it does not."""
    whole = dataclasses.replace(case, cut=0)
    inputs, allowed = subject.inputs(whole), subject.tolerance(whole)
    own = numerics.gap(_chunked_golden(subject, inputs, case), subject.eager(whole), allowed)
    if not own.ok:
        raise Inapplicable(f"the model itself does not have this property ({own.words})")
    one = subject.run(inputs, prompt_length=case.length)
    dense, cache, worst = dense_of(one.selections), None, 0.0
    for start in range(0, case.length, case.cut):
        stop = min(start + case.cut, case.length)
        rows = slice(start // subject.block, -(-stop // subject.block))
        wanted = [d[:, :, rows, : -(-stop // subject.key_block)] for d in dense]
        run = subject.run(
            _chunk(inputs, start, stop, subject.source.cache, cache),
            forced(wanted, f"the chunk [{start}, {stop})"),
            prompt_length=case.length,
        )
        cache = _cache_of(run.result)
        gap = numerics.gap(run.output, one.output[:, start:stop], allowed)
        worst = max(worst, require(gap, f"the chunk [{start}, {stop}) differs from one shot").worst)
    return Measure(worst)
