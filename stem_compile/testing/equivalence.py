"""``assert_equivalent``: one call for a unit test. Its failure names the first attention and position that diverge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from stem_compile.config import StemConfig
from stem_compile.ops import SparseAttentionArgs
from stem_compile.passes.graph.sites import AttentionSite
from stem_compile.passes.graph.values import module_path
from stem_compile.testing import numerics
from stem_compile.testing.case import Inputs
from stem_compile.testing.oracle import Mismatch
from stem_compile.testing.snippet import written
from stem_compile.testing.subject import Run, Subject
from stem_compile.testing.violation import Inapplicable, Violation, named


@dataclass(frozen=True)
class _Compared:
    run: Run
    golden: torch.Tensor
    allowed: float
    own_taps: list[torch.Tensor]
    golden_taps: list[torch.Tensor]


def assert_equivalent(
    model: torch.nn.Module, *args: Any, options: Mapping[str, Any] | StemConfig | None = None, **kwargs: Any
) -> None:
    """Assert that ``model`` compiled with backend "stem" computes, for these arguments, what it should.

    Without options: budget 1.0, so what the model itself computes. With a smaller budget: the model with dense
    attention under exactly the blocks that were selected, so that the approximation is not called an error. Off from
    fp64 by at most a small factor of the model's own error in its dtype (see
    ``numerics``), wherever ``attention_mask`` is not 0. Raises Violation (an AssertionError) naming the first attention
    and position that diverge, or why nothing was rewritten; Inapplicable for a model whose own output is NaN or that
    does not run in fp64.
    """
    given = dict(options) if isinstance(options, Mapping) else options
    subject = Subject(
        model,
        make_inputs=lambda batch, length, seed: (args, kwargs),
        options={"budget": 1.0} if given is None else given,
    )
    mask = kwargs.get("attention_mask")
    inputs = Inputs(args, kwargs, mask.bool() if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None)
    torch._dynamo.reset()
    try:
        compared = _compare(subject, inputs)
        gap = numerics.gap(compared.run.output, compared.golden, compared.allowed, inputs.valid)
        if not gap.ok:
            raise Violation("\n".join(_explained(subject, inputs, compared, gap)), gap)
    finally:
        torch._dynamo.reset()


def _compare(subject: Subject, inputs: Inputs) -> _Compared:
    run = subject.run(inputs)
    if not run.selections:
        reasons = "".join(f"\n  {module_path(hit.node)}: {hit.words}" for hit in run.attentions)
        raise Violation(f"no attention was rewritten, so there is nothing to compare{reasons or ': none was gap'}")
    subject.run_eager(inputs)  # a model that fails by itself says so in its own words
    try:
        return _witnessed(subject, inputs, run)
    except Mismatch as error:
        raise Violation(str(error)) from None
    except numerics.Undefined as error:
        raise Inapplicable(
            f"the model's own output in fp64 is NaN at {named(error.where)}: there is nothing to compare with"
        ) from None
    except Exception as error:
        raise Inapplicable(
            f"the model does not run in fp64, which others are compared with: {type(error).__name__}: {error}"
        ) from error


def _witnessed(subject: Subject, inputs: Inputs, run: Run) -> _Compared:
    own, own_taps = subject.oracle.run(inputs, run.selections, subject.config, exact=False)
    golden, golden_taps = subject.oracle.run(inputs, run.selections, subject.config, exact=True)
    full = all(bool((m.selection.dense(m.candidates) == m.candidates).all()) for m in run.selections)
    if full:
        # Nothing is left out: the model itself, uncompiled, is the better witness.
        golden, own = subject.golden_of(inputs), subject.run_eager(inputs)
    return _Compared(run, golden, numerics.tolerance(own, golden, subject.dtype, inputs.valid), own_taps, golden_taps)


def _explained(subject: Subject, inputs: Inputs, compared: _Compared, gap: numerics.Gap) -> list[str]:
    """The failure, line by line."""
    sites = [hit for hit in compared.run.attentions if isinstance(hit, AttentionSite)]
    lines = [
        "the compiled model is not equivalent",
        f"  output: {gap.words}, worst at {named(gap.where)}",
        *_first(subject, inputs, compared, sites),
    ]
    options = ", ".join(f"{k}={v}" for k, v in subject.options.items())
    return [
        *lines,
        f"  options: {options}",
        "  reproduce:",
        "",
        *(f"    {line}".rstrip() for line in written(subject, inputs, _fails(subject)).splitlines()),
    ]


def _first(subject: Subject, inputs: Inputs, compared: _Compared, sites: list[AttentionSite]) -> list[str]:
    first = numerics.first_beyond(compared.run.output, compared.golden, compared.allowed, inputs.valid)
    position = f"  first position: {named(first)}" if first else ""
    rows = None if inputs.valid is None else inputs.valid[:, None]
    for index, (observed, site, own, golden) in enumerate(
        zip(compared.run.selections, sites, compared.own_taps, compared.golden_taps)
    ):
        args = SparseAttentionArgs.for_(observed.attention, observed.selection, site.kernel)
        out = torch.ops.stem.sparse_attention(*args)
        valid = None if rows is None or rows.shape[-1] != out.shape[2] else rows.expand(out.shape[:3])
        allowed = numerics.tolerance(own, golden, out.dtype, valid)
        place = numerics.first_beyond(out, golden, allowed, valid)
        if place is not None:
            error = float(numerics.errors(out, golden)[place])
            block = place[2] // observed.selection.block_q
            return [
                (
                    f"  first attention: {module_path(site.node)} (number {index} of {len(sites)}, mask {site.words},"
                    f" kernel {site.kernel!r})"
                ),
                (
                    f"  first position there: {named(place)} (query block {block}): error {error:.2e}, budget"
                    f" {allowed:.2e}"
                ),
            ]
    return [
        position,
        (
            "  every attention is right for the inputs it got: what differs is between them, in the graph or in the"
            " inner compiler"
        ),
    ]


def _fails(subject: Subject) -> Any:
    def fails(inputs: Inputs) -> bool:
        try:
            compared = _compare(subject, inputs)
        except Violation:
            return True
        except Inapplicable:
            return False
        return not numerics.gap(compared.run.output, compared.golden, compared.allowed, inputs.valid).ok

    return fails
