"""GPU target: chooses a template for an attention; ``attention.py`` and ``selection.py`` launch it. Also runs Triton's
interpreter on CPU tensors.

Templates are written for any device Triton compiles to; Hopper has its own (``templates/hopper.py``). Everything stays
on the device: no host synchronisation, no values read back.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from stem_compile.algebra.symbolic import Q
from stem_compile.kernels import cache
from stem_compile.kernels.contract import DEFINITION, Kernels, Stopwatch
from stem_compile.kernels.spec import DTYPES
from stem_compile.kernels.targets.cuda import descriptors, device
from stem_compile.kernels.targets.cuda.attention import attend, attention_spec
from stem_compile.kernels.targets.cuda.block_scores import module
from stem_compile.kernels.targets.cuda.configurations import hopper_config
from stem_compile.kernels.targets.cuda.selection import select
from stem_compile.reasons import Reason
from stem_compile.selection import Attention
from stem_compile.selection.tpd import everything

__all__ = ["attend", "kernels", "select", "stopwatch", "supports"]

HEAD_DIMS = range(16, 257)


def supports(attention: Attention) -> Reason | None:
    """What the templates do not cover: other dtypes and head dims, and a sink that differs by query."""
    q, k, v = attention.q, attention.k, attention.v
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return Reason.DTYPE
    if any(width not in HEAD_DIMS for width in attention.widths):
        return Reason.HEAD_DIM
    sink = attention.score.sink
    return Reason.DEVICE if sink is not None and sink.has(Q) else None  # the kernels read one logit a head


def kernels(attention: Attention) -> Kernels:
    """Hopper's attention where the device, the shape and the memory layout allow, else the portable one. Scores that
    depend on positions rank blocks by the definition."""
    unseen = attention.score.positional and attention.spec.pooling != "mass"
    by_definition = unseen and not everything(attention.spec)
    select_name = DEFINITION if by_definition else attention_spec("select", replace(attention, score_text="")).name
    spec = attention_spec("hopper", attention)
    on_hopper = device.capability(attention.device)[0] == 9 and hopper_config(spec) is not None
    if not on_hopper or not all(descriptors.promises_address(x) for x in (attention.q, attention.k, attention.v)):
        spec = replace(spec, template="portable")
    # What cannot be printed as a kernel fails here, before the graph is touched.
    cache.load(spec)
    if select_name != DEFINITION:
        module("select", attention)
    return Kernels(select_name, spec.name)


def stopwatch(on: torch.device) -> Stopwatch | None:
    """Times are taken by events on the device."""
    return device.stopwatch(on)
