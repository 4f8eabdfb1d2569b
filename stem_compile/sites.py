"""What matching finds: an attention that can be rewritten, or one that cannot and why."""

from __future__ import annotations

import contextlib
import enum
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from stem_compile.masks import Full, Mask
from stem_compile.scores import Score


class Reason(enum.Enum):
    """Why an attention stays what it was. The value says it to a reader; ``remedy`` says what would change it."""

    DROPOUT = "dropout is active"
    GRADIENT = "gradients are needed"
    BIDIRECTIONAL = "no causal mask"
    CROSS_ATTENTION = "cross attention"
    DECODE = "decode: few queries"
    SHORT = "prompt is shorter than min_length"
    SLOWER = "dense attention is faster here"
    MASK = "mask is not understood"
    SCORE_BIAS = "the mask carries scores"
    SHAPE = "shapes are not those of one attention"
    DTYPE = "dtype is not fp16, bf16 or fp32"
    HEAD_DIM = "no kernel for this head dim"
    DEVICE = "no kernels for this device"
    DENSE_LAYER = "dense_layers keeps it dense"
    FUEL = "fuel is used up"
    ESCAPES = "scores or probabilities are used elsewhere"
    WRITTEN = "what it reads is written in place before it is done"
    INTERNAL = "stem_compile failed on it"

    @property
    def remedy(self) -> str:
        """What a user can do about it."""
        return _REMEDIES[self]


_REMEDIES = {
    Reason.DROPOUT: "call model.eval()",
    Reason.GRADIENT: "run under torch.no_grad() or torch.inference_mode()",
    Reason.BIDIRECTIONAL: "nothing to do: budgets that fall with position mean nothing without a causal order",
    Reason.CROSS_ATTENTION: "nothing to do: only self-attention is rewritten",
    Reason.DECODE: "nothing to do: only prefill is rewritten",
    Reason.SHORT: "lower min_length to rewrite short prompts too",
    Reason.SLOWER: "set min_length to rewrite from that length on, whatever was measured",
    Reason.MASK: "build the mask in the graph from positions, or pass a padding mask of shape [batch, keys]",
    Reason.SCORE_BIAS: "use a Boolean mask",
    Reason.SHAPE: "pass q, k, v as [batch, heads, length, head dim] with equal batch and a whole number of query heads a key head",
    Reason.DTYPE: "cast the model to fp16, bf16 or fp32",
    Reason.HEAD_DIM: "nothing to do short of another model: head dims up to 256 have kernels everywhere",
    Reason.DEVICE: "move the model to a CPU or a CUDA device",
    Reason.DENSE_LAYER: "take it out of dense_layers",
    Reason.FUEL: "raise fuel",
    Reason.ESCAPES: "do not ask for attention weights (output_attentions=False)",
    Reason.WRITTEN: "make the change out of place: x = x + y, torch.where, torch.cat",
    Reason.INTERNAL: "report it with the log of TORCH_LOGS=+stem_compile",
}


@dataclass(frozen=True)
class View:
    """A graph value seen another way: method calls applied in order once the attention is rewritten. ``view`` makes the plain ones nodes again."""

    node: fx.Node
    steps: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def apply(self, x: Any) -> Any:
        """The steps on an example value."""
        for name, arguments in self.steps:
            x = getattr(x, name)(*arguments)
        return x

    def emit(self, graph: fx.Graph) -> fx.Node:
        """Insert the steps at the graph's current place; the node that holds the result."""
        node, x = self.node, value(self.node)
        for name, arguments in self.steps:
            node = graph.call_method(name, (node, *arguments))
            with _fake_mode(x):
                x = getattr(x, name)(*arguments)
            node.meta["example_value"] = x
        return node


def _fake_mode(x: Any) -> Any:
    return x.fake_mode if hasattr(x, "fake_mode") else contextlib.nullcontext()


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


@dataclass(frozen=True)
class Mods:
    """``score_mod`` and ``mask_mod`` of a flex_attention: graphs of (score,) b, h, q, kv and the buffers given; None where there is none."""

    score: fx.GraphModule | None
    score_buffers: tuple[fx.Node, ...]
    mask: fx.GraphModule | None
    mask_buffers: tuple[fx.Node, ...]


@dataclass
class AttentionSite:
    """One attention in a graph: softmax(scale q k^T under mask) v.

    node: the node whose value it is. q: [B, H, q_len, d], k: [B, Hk, kv_len, d], v: [B, Hk, kv_len, dv] with native key heads.
    mask_node: the mask tensor of the graph, None without one. logits, product: input of the softmax and the raw q.k that it comes from, where the
    attention is written out; gate: logit [B, H, q_len] of a sink written as a gate on the output; cleared: whether hidden keys' weights are set to 0
    after the softmax; mods: flex_attention's functions.
    result: steps that give ``node``'s layout from [B, H, q_len, dv].
    mask: what it means; None until analyze_masks.
    average: mask whose blind rows are the mean of all values, as a softmax over equal scores makes them; None: they give 0, or there are none.
    score: what happens to scaled products. tensors, scalars: graph values of T0.. and S0.. scale: float factor of q.k.
    kernel: set by lower. index: position among the graph's attentions.
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
    mods: Mods | None = None
    result: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    mask: Mask | None = None
    average: Mask | None = None
    is_causal: bool = False
    tensors: list[fx.Node] = field(default_factory=list)
    scalars: list[Any] = field(default_factory=list)
    score: Score = field(default_factory=Score)
    kernel: str = ""
    index: int = 0

    @property
    def words(self) -> str:
        """Mask and score as a model author would say them."""
        return ", ".join(filter(None, ((Full() if self.mask is None else self.mask).words, self.score.words)))


def module_path(node: fx.Node) -> str:
    """Where in the model a node was called: ``model.layers.0.self_attn``; the node's own name where Dynamo recorded nothing."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    path = str(list(stack.values())[-1][0])
    for noise in ("L['self'].", "L['self']", "L['fn'].", "L['model'].", "._modules"):
        path = path.replace(noise, "")
    return path.replace("['", ".").replace("']", "").replace("[", ".").replace("]", "").strip(".") or node.name


def value(node: Any) -> Any:
    """The example value Dynamo recorded for a node (fake tensor, SymInt or number), or of a view of one; other things are their own value."""
    if isinstance(node, View):
        with _fake_mode(value(node.node)):
            return node.apply(value(node.node))
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else node
