"""Compare what was read of a site with what its graph computes, on small examples: what was misread is found before it
is trusted.

The part of the graph between the product of queries and keys and the softmax (or the mask's own part, beside a fused
attention) is run as it stands on made-up inputs. The mask and the score are taken as the kernels take them, from their
text, and must hide the same keys and give the same weights. Where lengths are symbols, small ones stand for them, two
sizes each. What cannot be run cheaply is not judged.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from stem_compile.algebra import blocks, masks, scores, symbolic, trial
from stem_compile.algebra.masks import Mask, environment
from stem_compile.algebra.symbolic import KV, B, H, Q
from stem_compile.kernels.triton import codegen
from stem_compile.passes.graph import normalize
from stem_compile.passes.graph.example import LARGEST, Example, NotShown
from stem_compile.passes.graph.sites import AttentionSite, Rejected, attempted
from stem_compile.passes.graph.values import View, value
from stem_compile.reasons import Reason

log = logging.getLogger(__name__)

SMALL = (41, 83)
"""What the shortest symbolic length becomes; longer ones a little more, in their order."""
HIDES = -8000.0
"""A logit at or below it hides its key."""
EDGE = 200.0
"""So near to it, either is right."""
SENSIBLE = 1e6
"""An example with a greater logit says nothing: made-up slopes and masks may multiply to that."""
BLOCK = 32
"""Queries and keys a block where a mask's bounds are tried."""

Shape = tuple[int, int, int, int]


class Differs(Exception):
    """What was read is not what the graph computes."""


def compare(attentions: list[AttentionSite | Rejected]) -> list[AttentionSite | Rejected]:
    """Sites that say what the graph says, or that cannot be asked; the others are rejected. Equal layers are compared
    once."""
    agreed: set[Any] = set()
    return [attempted(hit, "compare", lambda site: _compared(site, agreed)) for hit in attentions]


def _compared(site: AttentionSite, agreed: set[Any]) -> AttentionSite | Rejected:
    if site.mask_node is None and site.logits is None and site.mods is None:
        return site
    if (fails := _failure(site)) is not None:
        return Rejected(site.node, Reason.UNPROVEN, f"fails when it is tried: {fails}")
    key = _signature(site)
    if key in agreed:
        return site
    for sizes in _sizes(site):
        for draw in (0, 1):
            try:
                with _plain():
                    _agree(site, Example(site.node.graph, sizes, draw))
            except NotShown as error:
                log.debug("%s is not compared: %s", site.node.name, error)
            except Differs as error:
                return Rejected(site.node, Reason.UNPROVEN, str(error))
            except Exception as error:
                log.debug("%s cannot be evaluated", site.node.name, exc_info=True)
                return Rejected(site.node, Reason.UNPROVEN, f"cannot be evaluated: {type(error).__name__}: {error}")
    agreed.add(key)
    return site


def _failure(site: AttentionSite) -> str | None:
    """What goes wrong when mask and score are used as the kernels of the site's device use them."""
    known = [value(t) for t in site.tensors]
    tensors = [(t.dtype, tuple(n if isinstance(n, int) else None for n in t.shape)) for t in known]
    printers = () if value(site.q).device.type == "cpu" else (codegen.printed,)
    assert site.mask is not None
    try:
        mask, score = masks.encode(site.mask), site.score.text
    except symbolic.OutsideAlgebra as error:
        return str(error)
    with _plain():
        return trial.failure(mask, score, tensors, len(site.scalars), printers)


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    """Eager torch on a CPU, whatever modes the compiler or the user has on."""
    with (
        _disable_current_modes(),
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        yield


def _sizes(site: AttentionSite) -> Iterator[dict[Any, Any]]:
    """Numbers for the symbols of the graph's sizes. Short ones (batch, heads) stay what they are."""
    hints: dict[Any, int] = {}
    for node in site.node.graph.nodes:
        known = value(node)
        for number in (*known.shape, known.storage_offset()) if _is_plain(known) else (known,):
            if isinstance(number, torch.SymInt) and number.node.hint is not None:
                for symbol in number.node.expr.free_symbols:
                    hint = _values(number.node.shape_env).get(symbol)
                    if hint is not None:
                        hints[symbol] = int(hint)
    long = sorted({h for h in hints.values() if h > SMALL[0]})
    for least in SMALL if long else (0,):
        numbers = {h: least + 7 * long.index(h) if h in long else h for h in hints.values()}
        yield {symbol: sympy.Integer(numbers[hint]) for symbol, hint in hints.items()}


def _values(shapes: Any) -> Any:
    """What Dynamo traced with, by symbol. torch 2.13 and later warn at the older name."""
    return shapes.backed_var_to_val if hasattr(shapes, "backed_var_to_val") else shapes.var_to_val


def _is_plain(known: Any) -> bool:
    return isinstance(known, torch.Tensor) and known.layout == torch.strided


def _agree(site: AttentionSite, example: Example) -> None:
    """Raises Differs, or NotShown where the graph cannot be asked."""
    leaves = {leaf: example.stand_in(value(leaf)) for leaf in site.tensors if isinstance(leaf, fx.Node)}
    for leaf in _multiplied(site):
        leaves[leaf] = (leaves[leaf] > 0).to(leaves[leaf].dtype)
    if site.mods is not None:
        return
    if site.logits is None:
        assert site.mask_node is not None
        given = example.run([site.mask_node, *_holders(site)], leaves)
        _agree_on_mask(site, given[site.mask_node], _Site.of(site, example, given))
    else:
        _agree_on_logits(site, example, leaves)


def _multiplied(site: AttentionSite) -> list[fx.Node]:
    """Masks of ones and zeros that the logits are multiplied by: the predicate asks them for ones."""
    asked = site.mask.predicate.atoms(sympy.Eq, sympy.Ge) if site.mask is not None else ()
    numbers = [symbolic.load_index(e.lhs) for e in asked if e.rhs == 1]
    leaves = [site.tensors[n] for n in numbers if n is not None]
    return [n for n in leaves if isinstance(n, fx.Node) and value(n).dtype != torch.bool]


def _holders(site: AttentionSite) -> list[fx.Node]:
    return [n for n in site.scalars if isinstance(n, fx.Node)]


@dataclass(frozen=True)
class _Site:
    """What was read, in the example. shape: (B, H, q_len, kv_len); tensors, scalars: values of T0.. and S0.."""

    shape: Shape
    mask: Mask
    score: scores.Score
    tensors: list[torch.Tensor]
    scalars: list[int]

    @staticmethod
    def of(site: AttentionSite, example: Example, given: Mapping[fx.Node, Any]) -> _Site:
        q, k = value(site.q), value(site.k)
        batch, heads, q_len, kv_len = (example.size(n) for n in (*q.shape[:3], k.shape[2]))
        assert site.mask is not None
        return _Site(
            (batch, heads, q_len, kv_len),
            masks.decode(masks.encode(site.mask)),
            scores.decode(site.score.text),
            [t.apply(given[t.node]) if isinstance(t, View) else given[t] for t in site.tensors],
            [given[s] if isinstance(s, fx.Node) else example.size(s) for s in site.scalars],
        )

    def visible(self, shape: Shape) -> torch.Tensor:
        """The recovered mask as a tensor, expanded to ``shape``; its bounds over blocks are tried on the way."""
        shown = self.mask.dense(shape, self.tensors, self.scalars).expand(shape)
        pairs = blocks.candidates(
            self.mask, shape, self.tensors, self.scalars, BLOCK, BLOCK, torch.device("cpu")
        ).expand(shape[0], shape[1], -1, -1)
        tokens = pairs.repeat_interleave(BLOCK, 2)[:, :, : shape[2]].repeat_interleave(BLOCK, 3)[..., : shape[3]]
        if bool((shown & ~tokens).any()):
            raise Differs("the mask's bounds over blocks lose visible keys")
        return shown

    def logits(self, products: torch.Tensor, scale: float, visible: torch.Tensor) -> torch.Tensor:
        """The recovered score, -inf at hidden keys; with a column for a sink where there is one."""
        batch, heads, q_len, kv_len = products.shape
        env = environment(self.shape, self.tensors, self.scalars)
        places = ((B, batch, 0), (H, heads, 1), (Q, q_len, 2), (KV, kv_len, 3))
        env |= {s: torch.arange(n).view([-1 if d == at else 1 for d in range(4)]) for s, n, at in places}
        logits = self.score.apply(products * scale, env).masked_fill(~visible, -torch.inf)
        sink = self.score.sink_logits(self.shape, self.tensors, self.scalars, logits)
        return logits if sink is None else torch.cat([logits, sink.expand(batch, heads, q_len, 1)], -1)


def _agree_on_mask(site: AttentionSite, given: torch.Tensor, read: _Site) -> None:
    """A mask tensor beside q, k and v. Batch and heads that it does not tell apart are looked at once."""
    names = read.mask.predicate.free_symbols | read.score.expr.free_symbols
    own = (1,) * (4 - given.dim()) + tuple(given.shape)
    batch, heads = (n if d > 1 or s in names else 1 for n, d, s in zip(read.shape, own, (B, H), strict=False))
    shape = (batch, heads, read.shape[2], read.shape[3])
    if math.prod(shape) > LARGEST:
        raise NotShown("too many scores")
    visible = read.visible(shape)
    if given.dtype == torch.bool:
        _same(visible, given.expand(shape), shape)
        return
    products = _products(shape)
    logits = products * site.given_scale + given.double()
    _same_weights(read.logits(products, site.scale, visible), logits, given.dtype, read.shape[3], site.cleared)


def _agree_on_logits(site: AttentionSite, example: Example, leaves: dict[fx.Node, Any]) -> None:
    """An attention written out, from its product to its softmax."""
    assert site.logits is not None
    assert site.product is not None
    known = value(site.product)
    shape = example.shape(known)
    op = normalize.read(site.product)
    read = _Site.of(site, example, example.run(_holders(site), leaves))
    if math.prod(shape) != math.prod(read.shape):
        raise NotShown("the product has another layout")
    if min(read.shape) < 1:
        raise NotShown("lengths this small are none of the model's")
    products = _products(read.shape)
    product: torch.Tensor = products.reshape(shape).to(known.dtype)
    products = product.double().reshape(read.shape)
    if op is not None and op.name in ("baddbmm", "addmm", "addbmm"):
        added = [n for n in (op["input"], op["beta"], op["alpha"]) if isinstance(n, fx.Node)]
        parts = leaves | example.run(added, leaves)
        first, beta, alpha = (parts[n] if isinstance(n, fx.Node) else n for n in (op["input"], op["beta"], op["alpha"]))
        product = (alpha * product + (beta * first if beta != 0 else 0)).to(known.dtype)
    extra = [site.gate] if site.gate is not None else []
    ran = example.run([site.logits, *extra], leaves | {site.product: product})
    logits = ran[site.logits]
    if logits.dim() != 4:
        logits = logits.reshape(*read.shape[:3], logits.shape[-1])
    # A sink in front is read like one behind.
    logits = torch.cat([logits[..., site.first :], logits[..., : site.first]], -1).double()
    if site.gate is not None:
        logits = torch.cat([logits, ran[site.gate].double().expand(logits.shape[:3])[..., None]], -1)
    visible = read.visible(read.shape)
    have = read.logits(products, site.scale, visible)
    coarse = max((known.dtype, value(site.logits).dtype), key=lambda d: torch.finfo(d).eps)
    _same_weights(have, logits, coarse, read.shape[3], site.cleared)


def _products(shape: Shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 2


def _same(have: torch.Tensor, want: torch.Tensor, shape: tuple[int, ...]) -> None:
    wrong = have != want
    if bool(wrong.any()):
        place = tuple(int(i) for i in wrong.nonzero()[0])
        raise Differs(f"{int(wrong.sum())} of {math.prod(shape)} keys differ, first at (b, h, q, kv) = {place}")


def _same_weights(have: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, keys: int, cleared: bool) -> None:
    """Hidden keys, and weights in rows that see one, of recovered logits and the graph's, which are computed in
    ``dtype``."""
    if bool(want.isnan().any()) or bool((want > SENSIBLE).any()):
        raise NotShown("the example overflows")
    if have.shape != want.shape:
        raise Differs(f"logits {tuple(want.shape)} are read as {tuple(have.shape)}")
    sees = have[..., :keys].amax(-1, keepdim=True) > -torch.inf
    # A softmax sees differences: where all of a row is low, what hides is lower still.
    levels = [HIDES + torch.where(sees, x[..., :keys].amax(-1, keepdim=True), 0.0) for x in (have, want)]
    mine, theirs = (x[..., :keys] <= level for x, level in zip((have, want), levels))
    # The products of an example move what lies at the very edge.
    hidden = (mine, torch.where((want[..., :keys] - levels[1]).abs() < EDGE, mine, theirs))
    if not cleared:
        _same(hidden[0], hidden[1], tuple(hidden[0].shape))
    rows = ~hidden[0].all(-1, keepdim=True) & ~hidden[1].all(-1, keepdim=True)
    shown = want[..., :keys][~hidden[1]]
    peak = float(shown.abs().max()) if shown.numel() else 0.0
    bound = 4 * torch.finfo(dtype).eps * (1 + peak) + 1e-5
    weights = [torch.softmax(x, -1)[..., :keys] for x in (have, want)]
    error = torch.where(rows, (weights[0] - weights[1]).abs(), 0.0).nan_to_num(1.0)
    if bool((error > bound).any()):
        place = tuple(int(i) for i in (error > bound).nonzero()[0])
        raise Differs(f"weights differ by {float(error.max()):.2g}, first at (b, h, q, kv) = {place}")


def _signature(site: AttentionSite) -> Any:
    """What decides the outcome of a comparison. Layers that differ in their weights alone have the same."""
    start = site.mask_node if site.logits is None else site.logits
    places = {} if site.product is None else {site.product: "product"}
    for number, leaf in enumerate(t for t in site.tensors if isinstance(t, fx.Node)):
        places[leaf] = f"leaf {number} {value(leaf).dtype} {_sizes_of(value(leaf))}"
    between: set[fx.Node] = set()
    frontier = [] if start is None else [start]
    while frontier:
        node = frontier.pop()
        if node not in places and node not in between:
            between.add(node)
            frontier += node.all_input_nodes
    order: list[str] = []
    for node in sorted(between):
        called = node.op.startswith("call")
        arguments = str(fx.node.map_arg((node.args, node.kwargs), places.__getitem__)) if called else ""
        # Under dynamic=True each layer's float attributes are inputs of their own, as symbols and as 0-d tensors.
        known = value(node)
        number = isinstance(known, torch.SymFloat) or (isinstance(known, torch.Tensor) and not known.dim())
        order.append(f"{node.target if called else '' if number else node.name}{arguments} {_sizes_of(known)}")
        places[node] = f"#{len(order)}"
    shapes = [_sizes_of(value(x)) for x in (site.q, site.k)]
    texts = (str(site.mask.predicate) if site.mask is not None else "", site.score.text, site.scale, site.cleared)
    return (*texts, site.average is None, *shapes, *order)


def _sizes_of(known: Any) -> str:
    if isinstance(known, torch.SymFloat):
        return f"{known.node.hint}"
    return str(tuple(map(str, known.shape))) if isinstance(known, torch.Tensor) else str(known)
