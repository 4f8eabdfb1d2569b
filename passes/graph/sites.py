"""What matching finds: an attention that can be rewritten, or one that cannot and why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from stem_compile.algebra.masks import Full, Mask, encode
from stem_compile.algebra.scores import Score
from stem_compile.config import StemConfig
from stem_compile.passes.graph.values import View, module_path, value
from stem_compile.reasons import Reason
from stem_compile.selection import Attention

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rejected:
    """An attention that stays as it is. ``detail`` names the node or value that decided."""

    node: fx.Node
    reason: Reason
    detail: str = ""

    @property
    def words(self) -> str:
        """Reason, detail and remedy in one line."""
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.reason.value}{detail}: {self.reason.remedy}"


def failed(node: fx.Node, step: str, error: Exception) -> Rejected:
    """An attention that one of the steps failed on."""
    return Rejected(node, Reason.INTERNAL, f"{step}: {type(error).__name__}: {error}")


@dataclass(frozen=True)
class Mods:
    """``score_mod`` and ``mask_mod`` of a flex_attention: graphs of (score,) b, h, q, kv and the buffers given; None
    where there is none."""

    score: fx.GraphModule | None
    score_buffers: tuple[fx.Node, ...]
    mask: fx.GraphModule | None
    mask_buffers: tuple[fx.Node, ...]


@dataclass
class AttentionSite:
    """One attention in a graph: softmax(scale q k^T under mask) v.

    node: the node whose value it is. q: [B, H, q_len, d], k: [B, Hk, kv_len, d], v: [B, Hk, kv_len, dv] with native key
    heads.
    mask_node: the mask tensor of the graph, None without one. logits, product: input of the softmax and the raw q.k
    that it comes from, where the attention is written out; gate: logit [B, H, q_len] of a sink written as a gate on the
    output; cleared: whether hidden keys' weights are set to 0 after the softmax; mods: flex_attention's functions.
    result: steps that give ``node``'s layout from [B, H, q_len, dv].
    mask: what it means; None until analyze_masks.
    average: mask whose blind rows are the mean of all values, as a softmax over equal scores makes them; None: they
    give 0, or there are none. unseen: logits in the raw product, computed in logits_dtype, where those rows weigh keys
    by them instead.
    score: what happens to scaled products. tensors, scalars: graph values of T0.. and S0.. scale: float factor of q.k;
    given_scale: what it was before the mask was read, which may move it into the score.
    name: where in the model it is.
    kernel: set by lower. index: position among the model's attentions, as far as its graphs tell.
    """

    node: fx.Node
    q: fx.Node | View
    k: fx.Node | View
    v: fx.Node | View
    scale: float
    mask_node: fx.Node | None = None
    logits: fx.Node | None = None
    product: fx.Node | None = None
    gate: fx.Node | None = None
    cleared: bool = False
    first: int = 0
    mods: Mods | None = None
    result: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    mask: Mask | None = None
    average: Mask | None = None
    unseen: Any = None
    logits_dtype: torch.dtype = torch.float32
    is_causal: bool = False
    tensors: list[fx.Node | View] = field(default_factory=list)
    scalars: list[Any] = field(default_factory=list)
    score: Score = field(default_factory=Score)
    given_scale: float = 1.0
    name: str = ""
    kernel: str = ""
    index: int = 0

    def __post_init__(self) -> None:
        self.given_scale, self.name = self.scale, module_path(self.node)

    def attention(self, config: StemConfig) -> Attention:
        """The attention that the operators would be given, of example values."""
        return Attention(
            value(self.q),
            value(self.k),
            value(self.v),
            mask_text=encode(Full() if self.mask is None else self.mask),
            scale=self.scale,
            spec_text=config.selection_of(self.index).text(),
            score_text=self.score.text,
            tensors=[value(n) for n in self.tensors],
            scalars=[value(n) for n in self.scalars],
        )

    @property
    def words(self) -> str:
        """Mask and score as a model author would say them."""
        return ", ".join(filter(None, ((Full() if self.mask is None else self.mask).words, self.score.words)))


def attempted(
    hit: AttentionSite | Rejected, step: str, function: Callable[[AttentionSite], AttentionSite | Rejected]
) -> AttentionSite | Rejected:
    """What ``function`` makes of a site. One that it fails on is rejected, and costs the others nothing."""
    if isinstance(hit, Rejected):
        return hit
    try:
        return function(hit)
    except Exception as error:
        log.debug("%s failed on %s", step, hit.node.name, exc_info=True)
        return failed(hit.node, step, error)
