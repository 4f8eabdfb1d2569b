"""The oracle of a sparse run: the model's own graph with dense attention, restricted to exactly the blocks that were
selected.

It takes from the pipeline only which nodes are attentions. The mask is the tensor that the graph itself computes, not
what was recovered from it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from stem_compile.config import StemConfig
from stem_compile.passes import pipeline
from stem_compile.passes.graph.regions import bodies
from stem_compile.passes.graph.sites import AttentionSite, Mods
from stem_compile.passes.graph.values import View
from stem_compile.selection import Observed
from stem_compile.testing.case import Inputs
from stem_compile.testing.exact import Exact, Positions, Recorded, doubled
from stem_compile.testing.traced import Traced, primary


class Mismatch(AssertionError):
    """The oracle met another number of attentions than selections were captured."""


def restricted(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scale: float,
    blocks: torch.Tensor | None,
    size: tuple[int, int],
) -> torch.Tensor:
    """Dense attention over the visible keys of ``blocks`` (bool [B, H, rows, columns] of ``size`` tokens; None is all).

    A row whose mask shows it no key, whatever the blocks, weighs hidden keys by their finite scores; else a row that
    sees none is 0.
    """
    q_len, kv_len = q.shape[2], k.shape[2]
    group = q.shape[1] // k.shape[1]
    bias = mask if mask is not None and mask.is_floating_point() else None
    visible = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril()
    if bias is not None:
        visible = visible & _scored(bias)
    elif mask is not None:
        visible = visible & mask.bool()
    blind = None if bias is None else _blind(visible, bias)
    if blocks is not None:
        visible = visible & _tokens(blocks, size, q_len, kv_len)
    if blind is not None:
        visible = visible | blind
    shown = visible if bias is None else bias.masked_fill(~visible, -torch.inf)
    out = F.scaled_dot_product_attention(
        q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), attn_mask=shown, scale=scale
    )
    out = torch.where(visible.any(-1, keepdim=True), out, 0)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def weighted(
    logits: torch.Tensor,
    v: torch.Tensor,
    heads: int,
    blocks: torch.Tensor | None,
    size: tuple[int, int],
    cleared: bool = False,
) -> torch.Tensor:
    """The same for attention written out. logits: what its softmax gets, [.., q_len, kv_len] or with one more column,
    the sink's.

    cleared: whether the weights of hidden keys are set to 0 after it.
    """
    batch, (q_len, columns), kv_len = v.shape[0], logits.shape[-2:], v.shape[2]
    logits = (
        logits.expand(batch, heads, q_len, columns)
        if logits.dim() == 4
        else logits.reshape(batch, heads, q_len, columns)
    )
    visible = _scored(logits[..., :kv_len])
    blind = _blind(visible, logits[..., :kv_len])
    if blocks is not None:
        visible = visible & _tokens(blocks, size, q_len, kv_len)
    if not cleared:
        visible = visible | blind
    logits = torch.cat([logits[..., :kv_len].masked_fill(~visible, -torch.inf), logits[..., kv_len:]], -1)
    weights = logits.softmax(-1)[..., :kv_len].masked_fill(~visible, 0)
    return weights.to(v.dtype) @ v.repeat_interleave(heads // v.shape[1], 1)


def _scored(bias: torch.Tensor) -> torch.Tensor:
    """Where a key is not hidden: written out by hand, a hidden one has the dtype's lowest score."""
    return bias > torch.finfo(torch.float16).min


def _blind(visible: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Rows in which no key is seen, but some have a finite score: [.., q_len, 1]."""
    return ~visible.any(-1, keepdim=True) & (scores > -torch.inf).any(-1, keepdim=True)


def _tokens(blocks: torch.Tensor, size: tuple[int, int], q_len: int, kv_len: int) -> torch.Tensor:
    return blocks.repeat_interleave(size[0], 2)[:, :, :q_len].repeat_interleave(size[1], 3)[..., :kv_len]


def _modified(mods: Mods, q: torch.Tensor, k: torch.Tensor, scale: float, value: Callable[[Any], Any]) -> torch.Tensor:
    """Scores of a flex_attention after the user's own functions."""
    axes = [
        torch.arange(n, device=q.device).view([-1 if i == j else 1 for j in range(4)])
        for i, n in enumerate((*q.shape[:3], k.shape[2]))
    ]
    scores: torch.Tensor = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(-1, -2) * scale
    if mods.score is not None:
        scores = mods.score(scores, *axes, *(value(b) for b in mods.score_buffers))
    if mods.mask is not None:
        scores = scores.masked_fill(~mods.mask(*axes, *(value(b) for b in mods.mask_buffers)), -torch.inf)
    return scores


class _Replay(fx.Interpreter):
    """Runs a graph with its attentions answered by ``attend``."""

    def __init__(
        self, module: fx.GraphModule, sites: dict[fx.Node, AttentionSite], attend: Callable[..., torch.Tensor]
    ) -> None:
        # A site's keys may be taken from before they were repeated: nothing is freed early.
        super().__init__(module, garbage_collect_values=False)
        self._sites, self._attend = sites, attend

    def run_node(self, node: fx.Node) -> Any:
        site = self._sites.get(node)
        if site is None:
            for body in bodies(node):
                if any(s in self._sites for s in body.graph.nodes):
                    return self._run_body(node, body)
            return super().run_node(node)
        out = self._attend(site, self._value)
        return View(node, site.result).apply(out, self.env.__getitem__)

    def _run_body(self, node: fx.Node, body: fx.GraphModule) -> Any:
        """A checkpointed block, run where it stands: its operands follow it among the operator's arguments."""
        arguments = self.fetch_args_kwargs_from_env(node)[0]
        operands = arguments[next(i for i, a in enumerate(arguments) if a is body) + 1 :]
        return _Replay(body, self._sites, self._attend).run(*(x for x in operands if not isinstance(x, str)))

    def _value(self, of: fx.Node | View) -> Any:
        return of.apply(self.env[of.node]) if isinstance(of, View) else self.env[of]


def _is_data(x: Any, buffers: frozenset[int]) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point() and id(x) not in buffers


class Oracle:
    """Dense runs of traced graphs. One a trace: what is built for a graph answers to the oracle that built it."""

    def __init__(self, traced: Traced) -> None:
        self._traced = traced
        self._next: Iterator[Any] = iter(())
        self._taps: list[torch.Tensor] = []
        self._positions = Positions()

    def run(
        self, inputs: Inputs, selections: Sequence[Observed] | None, config: StemConfig, exact: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(output, each attention's output [B, H, q_len, dv]). selections: those captured, None for all blocks;
        exact: in fp64, at the positions of the last run that was not (``exact.Positions``). Raises Mismatch."""
        self._taps, self._next = [], iter(selections or ())
        if exact:
            self._positions.rewind()
        else:
            self._positions = Positions()
        self._dense, self._exact = selections is None, exact
        build = functools.partial(self._build, config=config)
        key = ("oracle", config)
        try:
            result = self._traced.run(key, build, *inputs.args, **inputs.kwargs)
        except Mismatch as error:
            # fx adds the node and its stack to the message, which say nothing here.
            raise Mismatch(str(error).splitlines()[0]) from None
        if next(self._next, None) is not None:
            raise Mismatch(f"{len(selections or ())} selections were captured for {len(self._taps)} attentions")
        return primary(result), self._taps

    def _attend(self, site: AttentionSite, value: Callable[[Any], Any]) -> torch.Tensor:
        blocks, size = None, (1, 1)
        if not self._dense:
            observed = next(self._next, None)
            if observed is None:
                raise Mismatch(f"a selection is missing for attention {len(self._taps)}")
            blocks = observed.selection.dense(observed.candidates)
            size = (observed.selection.block_q, observed.selection.block_k)
        q, k, v = value(site.q), value(site.k), value(site.v)
        if site.logits is not None:
            out = weighted(value(site.logits), v, q.shape[1], blocks, size, site.cleared)
        elif site.mods is not None:
            out = weighted(_modified(site.mods, q, k, site.scale, value), v, q.shape[1], blocks, size)
        else:
            mask = None if site.mask_node is None else value(site.mask_node)
            out = restricted(q, k, v, mask, site.is_causal, site.scale, blocks, size)
        self._taps.append(out)
        return out

    def _build(self, module: fx.GraphModule, examples: list[Any], config: StemConfig) -> Callable[..., Any]:
        attentions = pipeline.analyze(module, config)
        sites = {hit.node: hit for hit in attentions if isinstance(hit, AttentionSite)}

        def call(*args: Any) -> Any:
            replay = _Replay(module, sites, self._attend)
            mine = doubled(args) if self._exact else args
            # A buffer, such as rotary frequencies, is no data.
            data = [x for x, of in zip(mine, args, strict=True) if _is_data(of, self._traced.buffers)]
            with (Exact if self._exact else Recorded)(self._positions, data):
                return replay.run(*mine)

        return call
