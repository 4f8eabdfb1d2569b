"""Give every site its mask and its score. A tensor that is not understood is kept and read where it is needed: never a
wrong answer."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from stem_compile.algebra import masks, symbolic
from stem_compile.algebra.blind import can_be_blind
from stem_compile.algebra.masks import Causal, Mask
from stem_compile.algebra.scores import Score
from stem_compile.algebra.symbolic import KV, KV_LEN, Q_LEN, SCORE, B, H, Q
from stem_compile.config import StemConfig
from stem_compile.passes.graph import normalize
from stem_compile.passes.graph.memory import written_between
from stem_compile.passes.graph.sites import AttentionSite, Mods, Rejected, attempted
from stem_compile.passes.graph.trace_back import CASTS
from stem_compile.passes.graph.values import View, value
from stem_compile.passes.reading.expressions import as_expr, boolean, broadcast_index, number, same
from stem_compile.passes.reading.interpret import Interpreter, SymTensor
from stem_compile.passes.reading.logits import read_logits
from stem_compile.passes.reading.order import runs_forward
from stem_compile.passes.reading.split_logits import faintly_hidden, in_floats, split_logits
from stem_compile.passes.reading.unreadable import Unreadable
from stem_compile.passes.reading.weigh_hidden import evenly_hidden, weighed_hidden
from stem_compile.reasons import Reason

log = logging.getLogger(__name__)


class Written(Unreadable):
    """A tensor that the mask or the score is read from is written in place."""


def analyze_masks(
    attentions: list[AttentionSite | Rejected], config: StemConfig | None = None
) -> list[AttentionSite | Rejected]:
    """Sites with ``mask``, ``score``, ``scale``, ``tensors`` and ``scalars`` set, or rejected. Masks that layers share
    are read once."""
    lengths = tuple(
        {
            str(n): n
            for hit in attentions
            if isinstance(hit, AttentionSite)
            for n in (value(hit.q).shape[2], value(hit.k).shape[2])
        }.values()
    )
    interpreters = Interpreter(lengths), Interpreter(lengths, opaque=True)
    any_order = config is not None and config.takes_any_order
    return [
        attempted(hit, "analyze_masks", lambda site: _analyzed(site, interpreters, any_order)) for hit in attentions
    ]


def _analyzed(
    site: AttentionSite, interpreters: tuple[Interpreter, Interpreter], any_order: bool
) -> AttentionSite | Rejected:
    if site.mask_node is None and site.logits is None and site.mods is None:
        site.mask = Causal(0) if site.is_causal else masks.Full()
    elif site.is_causal:
        return Rejected(site.node, Reason.MASK, "is_causal and a mask together")
    else:
        error = _unread(site, interpreters)
        if error is not None:
            return Rejected(site.node, Reason.WRITTEN if isinstance(error, Written) else Reason.MASK, str(error))
    assert site.mask is not None
    learned = frozenset(n for n, t in enumerate(site.tensors) if _is_learned(t))
    lengths = value(site.q).shape[2], value(site.k).shape[2]

    def runs(mask: Mask) -> bool:
        return mask.orders_positions(learned) or runs_forward(mask.predicate, *lengths)

    if not any_order and not runs(site.mask):
        if (faint := faintly_hidden(site.score.expr)) is not None and runs(site.mask & masks.predicate(faint[0])):
            return Rejected(site.node, Reason.FAINT, f"{faint[1]:g}")
        alone = not isinstance(site.mask, masks.Full) or same(value(site.q).shape[2], value(site.k).shape[2])
        return Rejected(
            site.node,
            Reason.BIDIRECTIONAL if alone else Reason.CROSS_ATTENTION,
            "" if isinstance(site.mask, masks.Full) else site.mask.words,
        )
    return site


def _unread(site: AttentionSite, interpreters: tuple[Interpreter, Interpreter]) -> Exception | None:
    """Read the site; where that fails, read it again with tensors that are not understood as loads. Returns what
    stopped both, None where one succeeded. An exception of a reader counts as not understood."""
    error: Exception | None = None
    for reader in interpreters:
        try:
            _read(site, reader)
            return None
        except Unreadable as unreadable:
            error = unreadable
        except Exception as failure:
            log.debug("a reader failed on %s", site.node.name, exc_info=True)
            if reader is interpreters[-1]:
                raise
            error = failure
    return error


def _is_learned(tensor: fx.Node | View) -> bool:
    """Whether a floating-point tensor is computed from others of the kind: weights, queries. One that comes from
    outside as it is may hold a mask."""
    tensor = tensor.node if isinstance(tensor, View) else tensor
    visited, frontier = {tensor}, [tensor]
    while frontier:
        node = frontier.pop()
        if node.op in ("placeholder", "get_attr") and not _covers(value(node).shape, value(tensor).shape):
            return True
        sources = (
            []
            if (name := normalize.spelling(node)) in normalize.LIKE and "_as" not in str(name)
            else node.all_input_nodes
        )
        sources = sources[:1] if name in ("to", "type_as", "expand_as", "view_as", "reshape_as") else sources
        floats = [
            n
            for n in sources
            if n not in visited and isinstance(value(n), torch.Tensor) and value(n).is_floating_point()
        ]
        visited.update(floats)
        frontier.extend(floats)
    return False


def _covers(outer: Any, inner: Any) -> bool:
    """Whether the last two sizes are those of ``inner`` or more: a buffer that a mask is cut from."""
    pairs = list(zip(outer[-2:], inner[-2:]))
    return len(outer) > 1 and all(
        str(a) == str(b) or (isinstance(a, int) and isinstance(b, int) and a >= b) for a, b in pairs
    )


@dataclass(frozen=True)
class Reading:
    """What a site says in symbols: visible keys, factor of the products and score. logits: input of the softmax, None
    where hidden keys weigh nothing whatever they hold; dtype: what it is computed in."""

    predicate: Any
    scale: float
    score: Score
    logits: Any = None
    dtype: torch.dtype = torch.float32


def _read(site: AttentionSite, interpreter: Interpreter) -> None:
    """Set what the site means. Raises Unreadable."""
    q, k = value(site.q), value(site.k)
    heads, q_len, kv_len = q.shape[1], q.shape[2], k.shape[2]
    interpreter.focus({}, {H: heads, Q: q_len, KV: kv_len, B: q.shape[0]})
    if site.mods is not None:
        reading = _of_functions(site, site.mods, interpreter)
    elif site.logits is None:
        reading = _of_mask(site, interpreter)
    else:
        reading = _of_logits(site, site.logits, interpreter, heads, q_len, kv_len)
    for node in interpreter.read_nodes:
        if written_between(node, site.node):
            raise Written(node.name)
    if reading.predicate.has(SCORE):
        raise Unreadable("which keys are visible depends on the scores")
    _settle(site, reading, interpreter, q_len, kv_len)


def _of_functions(site: AttentionSite, mods: Mods, interpreter: Interpreter) -> Reading:
    """flex_attention: a function of positions hides, another one changes scaled scores."""
    visible, modified = sympy.true, SCORE
    if mods.mask is not None:
        visible = boolean(interpreter.call(mods.mask, [B, H, Q, KV], mods.mask_buffers))
    if mods.score is not None:
        modified = number(interpreter.call(mods.score, [SCORE, B, H, Q, KV], mods.score_buffers))
    predicate, scale, score = split_logits(sympy.sympify(modified).subs(SCORE, SCORE * sympy.Rational(site.scale)))
    return Reading(sympy.And(visible, predicate), scale, score)


def _of_mask(site: AttentionSite, interpreter: Interpreter) -> Reading:
    """A mask tensor beside q, k and v: a Boolean one hides, a float one is added to the scaled scores."""
    assert site.mask_node is not None
    tensor = interpreter.tensor(site.mask_node)
    expr = _at(tensor, (B, H, Q, KV))
    if tensor.kind == "bool":
        return Reading(boolean(expr), site.scale, Score())
    logits = SCORE * sympy.Float(site.scale) + number(expr)
    return Reading(*split_logits(logits, interpreter.row_maximum), logits)


def _of_logits(
    site: AttentionSite, source: fx.Node, interpreter: Interpreter, heads: Any, q_len: Any, kv_len: Any
) -> Reading:
    """An attention written out: everything between the product and the softmax, with a sink where there is one."""
    assert site.product is not None
    logits = read_logits(source, site.product, (heads, q_len, kv_len), site.first, interpreter)
    predicate, scale, score = split_logits(logits.expr, interpreter.row_maximum)
    score = Score(score.expr, logits.sink)
    if site.gate is not None:
        # out * sigmoid(logsumexp - g): the share that the keys keep beside a sink of logit g.
        gate = interpreter.tensor(site.gate)
        place = (B, Q) if value(source).dim() == 3 else (B, H, Q)
        score = Score(score.expr, number(gate.at(broadcast_index(place[len(place) - len(gate.shape) :], gate.shape))))
    return Reading(predicate, scale, score, logits.expr, logits.dtype)


def _settle(site: AttentionSite, reading: Reading, interpreter: Interpreter, q_len: Any, kv_len: Any) -> None:
    """Write a reading down in what the kernels are given: lengths, tensors T0, T1, ... and scalars S0, S1, ..."""
    score, even, unseen, dtype = reading.score, None, None, _rounded_to(site, reading.dtype)
    # A sink takes all that hidden keys have.
    if reading.logits is not None and score.sink is None and not site.cleared:
        even = evenly_hidden(
            reading.logits, dtype, [value(t).dtype for t in interpreter.leaves], interpreter.row_maximum
        )
        if even is None and weighed_hidden(reading.logits, dtype, interpreter.row_maximum):
            even, unseen = reading.predicate, in_floats(reading.logits)
    if even is not None and not _may_be_blind(reading.predicate, q_len, kv_len):
        even = unseen = None
    parts = [reading.predicate, score.expr, *(e for e in (score.sink, unseen, even) if e is not None)]
    parts = [_in_lengths(sympy.sympify(p), q_len, kv_len) for p in parts]
    parts, tensors = _renumbered(parts, interpreter.leaves)
    parts, scalars = _with_scalars(parts, site.node.graph)
    if any(value(t).dim() == 0 and not value(t).is_floating_point() and value(t).dtype == torch.bool for t in tensors):
        raise Unreadable("a condition without dimensions, known only at run time")
    site.mask, site.score = masks.predicate(parts[0]), Score(parts[1], parts[2] if score.sink is not None else None)
    site.average = None if even is None else masks.predicate(parts[-1])
    site.unseen, site.logits_dtype = None if unseen is None else parts[-2], dtype
    site.scale, site.tensors, site.scalars = reading.scale, tensors, scalars


def _rounded_to(site: AttentionSite, dtype: torch.dtype) -> torch.dtype:
    """The coarsest dtype of the logits up to the softmax; ``dtype`` is what they are computed in. Casts on the way are
    no part of ``site.logits``."""
    frontier, dtypes = [] if site.logits is None else [site.logits], [dtype]
    while frontier:
        node = frontier.pop()
        dtypes.append(value(node).dtype)
        frontier += [u for u in node.users if normalize.spelling(u) in CASTS and value(u).dtype.is_floating_point]
    return max((d for d in dtypes if d.is_floating_point), key=lambda d: torch.finfo(d).eps)


def _may_be_blind(predicate: Any, q_len: Any, kv_len: Any) -> bool:
    """Whether a row may see no key. Comparing symbolic lengths that differ installs a guard."""
    before, kv = as_expr(kv_len) - as_expr(q_len), as_expr(kv_len)
    if kv.is_Symbol and not before.is_number and kv_len >= q_len:
        before = sympy.Dummy(integer=True, nonnegative=True)
        predicate = predicate.subs(kv, as_expr(q_len) + before)
    return can_be_blind(predicate, before)


def _at(tensor: SymTensor, index: tuple[Any, ...]) -> Any:
    """The tensor's value at (b, h, q, kv), broadcast as attention broadcasts it."""
    rank = len(tensor.shape)
    return tensor.at(broadcast_index(index[4 - rank :], tensor.shape))


def _in_lengths(expr: Any, q_len: Any, kv_len: Any) -> Any:
    """Write Dynamo's size symbols as q_len and kv_len wherever those determine them."""
    q_expr, kv_expr = as_expr(q_len), as_expr(kv_len)
    known: dict[Any, Any] = {}
    if q_expr.is_Symbol:
        known[q_expr] = Q_LEN
    rest = [s for s in kv_expr.free_symbols if s not in known]
    if len(rest) == 1 and kv_expr.coeff(rest[0]) == 1:
        known[rest[0]] = KV_LEN - (kv_expr - rest[0]).subs(known)
    return expr.subs(known) if known else expr


def _renumbered(parts: list[Any], leaves: list[fx.Node | View]) -> tuple[list[Any], list[fx.Node | View]]:
    """Keep only the loads that the expressions still make, numbered from 0."""
    loads = {a for p in parts for a in p.atoms(sympy.core.function.AppliedUndef) if symbolic.load_index(a) is not None}
    used = sorted({symbolic.load_index(load) or 0 for load in loads})
    place = {n: i for i, n in enumerate(used)}

    def moved(e: Any) -> Any:
        return symbolic.tensor(place[symbolic.load_index(e) or 0] + len(leaves))(*e.args)

    def settled(e: Any) -> Any:
        return symbolic.tensor((symbolic.load_index(e) or 0) - len(leaves))(*e.args)

    # Two steps, so that T1 -> T0 does not meet an older T0.
    for step in (moved, settled):
        parts = [p.replace(lambda e: symbolic.load_index(e) is not None, step) for p in parts]
    if len(used) > symbolic.LOADS:
        raise Unreadable(f"{len(used)} tensors are read; at most {symbolic.LOADS}")
    return parts, [leaves[i] for i in used]


def _with_scalars(parts: list[Any], graph: fx.Graph) -> tuple[list[Any], list[fx.Node]]:
    """Turn size symbols that lengths do not determine into S0, S1, ..., each the graph value that holds it."""
    free = sorted(set().union(*(p.free_symbols for p in parts)) - {B, H, Q, KV, Q_LEN, KV_LEN, SCORE}, key=str)
    if not free:
        return parts, []
    holders: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        known = value(node)
        if isinstance(known, torch.SymInt):
            holders.setdefault(as_expr(known), node)
    for symbol in free:
        if symbol not in holders:
            raise Unreadable(f"no graph value holds {symbol}")
    renamed = {s: symbolic.scalar(i) for i, s in enumerate(free)}
    return [p.subs(renamed) for p in parts], [holders[s] for s in free]
