"""Apply the user's options and the lengths: which of the attentions that could be rewritten are."""

from __future__ import annotations

import sympy
from sympy.core.function import AppliedUndef

from stem_compile.algebra import symbolic
from stem_compile.algebra.blocks import split
from stem_compile.algebra.masks import environment
from stem_compile.config import StemConfig
from stem_compile.kernels import crossover, launch
from stem_compile.passes.graph.sites import AttentionSite, Rejected, attempted
from stem_compile.passes.graph.values import value
from stem_compile.reasons import Reason
from stem_compile.selection import Attention, policies
from stem_compile.selection.tpd import everything


def decide(attentions: list[AttentionSite | Rejected], config: StemConfig) -> list[AttentionSite | Rejected]:
    """Apply the user's options and the lengths. Comparing a symbolic length installs a guard: another length compiles
    anew, once."""
    decided = [attempted(hit, "decide", lambda site: _decided(site, config)) for hit in attentions]
    allowed = config.fuel if config.fuel is not None else len(decided)
    for i, hit in enumerate(decided):
        if isinstance(hit, AttentionSite):
            allowed -= 1
            if allowed < 0:
                decided[i] = Rejected(hit.node, Reason.FUEL, f"fuel={config.fuel}")
    return decided


def _decided(site: AttentionSite, config: StemConfig) -> AttentionSite | Rejected:
    if config.context_parallel is None and config.keeps_dense(site.index):
        return Rejected(site.node, Reason.DENSE_LAYER, f"attention {site.index}")
    attention = site.attention(config)
    policies.check(attention.spec)
    reason = launch.refusal(attention)
    if reason is not None:
        return Rejected(site.node, reason, f"{attention.device.type}, {site.words}")
    kv_len = value(site.k).shape[2]
    if isinstance(kv_len, int) and kv_len == 0:
        return Rejected(site.node, Reason.SHORT, "no keys")
    if config.context_parallel is not None:
        # A rank's tokens are a part of the prompt: dense attention over them would be another one.
        return site
    shortest = config.shortest
    # Short whatever was measured; a symbolic length is compared once only, since each comparison installs a guard.
    asked = config.min_length is not None or (isinstance(kv_len, int) and kv_len < shortest)
    if not asked:
        masked = site.mask_node is not None
        shortest = crossover.shortest(attention, masked, shortest)
    if kv_len < shortest:
        if shortest > config.shortest:
            return Rejected(
                site.node,
                Reason.SLOWER,
                f"{kv_len} keys; selecting wins from {shortest}" if shortest < crossover.NEVER else f"{kv_len} keys",
            )
        return Rejected(site.node, Reason.SHORT, f"{kv_len} keys, min_length {shortest}")
    cut = cut_block(attention) if config.prompt_length is not None else ""
    return Rejected(site.node, Reason.CHUNK, cut) if cut else site


def cut_block(attention: Attention) -> str:
    """How a chunk of a longer prompt cuts a block of queries in two, "" where it does not. Half a block of queries does
    not select what the whole one does, so such a chunk cannot select as one shot would. A symbolic length is asked by
    its remainder, which installs a guard."""
    spec, (_, _, q_len, kv_len) = attention.spec, attention.shape
    if everything(spec):
        return ""
    causal = split(attention.mask.mask).causal
    begin = kv_len - q_len
    if causal is not None:
        offset = sympy.sympify(causal)
        if offset.atoms(AppliedUndef):
            return "where it begins is known at run time only"
        begin = symbolic.evaluate(offset, environment(attention.shape, (), attention.scalars))
    end = begin + q_len
    if begin % spec.block_q != 0:
        return f"it begins at token {begin}, block_size is {spec.block_q}"
    if end < spec.prompt_length and end % spec.block_q != 0:
        return f"it ends at token {end}, block_size is {spec.block_q}"
    return ""
