"""Give rows that see no key what eager attention gives them: ``where(stem::blind_rows, mean(v), attention)`` where
their scores are equal and finite, ``stem::blind_attention`` in the mean's place where some are finite and they differ.

The attention itself stays as it is and gives 0 there, so that no kernel and no selection knows of it; rows that see a
key cost one pass over the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from stem_compile import ops
from stem_compile.algebra import masks
from stem_compile.algebra.scores import Score
from stem_compile.passes.graph.call import call
from stem_compile.passes.graph.sites import AttentionSite
from stem_compile.passes.graph.values import View, value


def average_blind(attention: fx.Node, site: AttentionSite, blind: dict[str, fx.Node]) -> fx.Node:
    """Insert it at the graph's current place. blind: rows that earlier layers asked for, by what they asked."""
    assert site.average is not None
    args = ops.SparseAttentionArgs.of(attention)
    q, k, v = args.q, args.k, args.v
    heads, key_heads = value(q).shape[1], value(v).shape[1]
    asked: tuple[Any, ...] = (args.tensors, args.scalars, masks.encode(site.average))
    key = str((asked, [*value(q).shape[:3], value(k).shape[2]]))
    if key not in blind:
        blind[key] = call(attention.graph, ops.BLIND_ROWS, (q, k, *asked), attention)
    if site.unseen is not None:
        logits = (blind[key], args.tensors, args.scalars, Score(site.unseen).text, site.logits_dtype)
        hidden = call(attention.graph, ops.BLIND_ATTENTION, (q, k, v, *logits), attention)
        return call(attention.graph, torch.where, (blind[key], hidden, attention), attention)
    # In fp32: a sum over all keys is beyond fp16, and bf16 has no digits for it.
    steps: tuple[Any, ...] = (("float", ()), ("mean", (2, True)), ("to", (value(v).dtype,)))
    if heads != key_heads:
        steps += (("repeat_interleave", (int(heads // key_heads), 1)),)
    mean = View(v, steps).emit(attention.graph)
    return call(attention.graph, torch.where, (blind[key], mean, attention), attention)


def averaged(attention: fx.Node) -> bool:
    """Whether an attention's result is read through such a choice, and only so."""
    return [(u.target, getattr(u.args[0], "target", None)) for u in attention.users] == [(torch.where, ops.BLIND_ROWS)]
