"""Give every site its mask in the algebra. What is not understood is ``Opaque`` and rejected: never a wrong answer."""

from __future__ import annotations

from typing import Any

import sympy
from torch import fx

from stem_compile import masks, symbolic
from stem_compile.masks import And, Causal, Mask, Opaque
from stem_compile.passes.interpret import Interpreter, SymTensor, Unreadable, as_expr, boolean
from stem_compile.passes.interpret import _broadcast_index as broadcast_index
from stem_compile.passes.match import mutated_between
from stem_compile.sites import AttentionSite, Reason, Rejected, value
from stem_compile.symbolic import KV, KV_LEN, Q_LEN, B, H, Q


def analyze_masks(found: list[AttentionSite | Rejected]) -> list[AttentionSite | Rejected]:
    """Sites with ``mask``, ``tensors`` and ``scalars`` set, or rejected. Masks that layers share are read once."""
    interpreter = Interpreter()
    return [hit if isinstance(hit, Rejected) else _analyzed(hit, interpreter) for hit in found]


def _analyzed(site: AttentionSite, interpreter: Interpreter) -> AttentionSite | Rejected:
    if site.mask_node is None:
        if not site.is_causal:
            same = str(value(site.q).shape[2]) == str(value(site.k).shape[2])
            return Rejected(site.node, Reason.BIDIRECTIONAL if same else Reason.CROSS_ATTENTION)
        site.mask = Causal(0)
        return site
    if site.is_causal:
        return Rejected(site.node, Reason.MASK, "is_causal and a mask together")
    try:
        site.mask = read_mask(site, interpreter)
    except Unreadable as error:
        site.mask = Opaque(str(error))
        mask = value(site.mask_node)
        if mask.dtype.is_floating_point:
            return Rejected(site.node, Reason.SCORE_BIAS, str(error))
        return Rejected(site.node, Reason.MASK, str(error))
    terms = site.mask.terms if isinstance(site.mask, And) else (site.mask,)
    if not any(isinstance(t, Causal) for t in terms) and not _orders_positions(site.mask):
        return Rejected(site.node, Reason.BIDIRECTIONAL, site.mask.words)
    if not all(isinstance(t, Causal | masks.Padding) for t in terms):
        return Rejected(site.node, Reason.MASK, site.mask.words)
    return site


def _orders_positions(mask: Mask) -> bool:
    """Whether queries are held against keys in a way that is not plainly causal, through runtime positions for example."""
    loads = {a for a in mask.predicate.atoms(sympy.Function) if symbolic.load_index(a) is not None}
    return Q in mask.predicate.free_symbols and (any(Q in load.free_symbols for load in loads) or KV in mask.predicate.free_symbols)


def read_mask(site: AttentionSite, interpreter: Interpreter) -> Mask:
    """The mask of one site; sets its ``tensors`` and ``scalars``. Raises Unreadable."""
    assert site.mask_node is not None
    tensor = interpreter.tensor(site.mask_node)
    if tensor.kind != "bool":
        raise Unreadable(f"{site.mask_node.name} is {tensor.kind}")
    for node in interpreter.read_nodes:
        if mutated_between(node, site.node):
            raise Unreadable(f"{node.name} is written in place")
    expr = boolean(tensor.at(broadcast_index((B, H, Q, KV), _padded(tensor).shape)[4 - len(tensor.shape) :]))
    expr = _in_lengths(expr, value(site.q).shape[2], value(site.k).shape[2])
    expr, site.tensors = _renumbered(expr, interpreter.leaves)
    expr, site.scalars = _with_scalars(expr, site.node.graph)
    return masks.predicate(expr)


def _padded(tensor: SymTensor) -> SymTensor:
    return SymTensor((1,) * (4 - len(tensor.shape)) + tuple(tensor.shape), tensor.at, tensor.kind)


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


def _renumbered(expr: Any, leaves: list[fx.Node]) -> tuple[Any, list[fx.Node]]:
    """Keep only the loads that the predicate still makes, numbered from 0."""
    loads = sorted({a for a in expr.atoms(sympy.Function) if symbolic.load_index(a) is not None}, key=str)
    for load in loads:
        if {Q, KV} <= load.free_symbols:
            raise Unreadable(f"{leaves[_number(load)].name} is read at query and key together")
    used = sorted({_number(load) for load in loads})
    # Two steps, so that T1 -> T0 does not meet an older T0.
    expr = expr.replace(lambda e: symbolic.load_index(e) is not None, lambda e: symbolic.tensor(used.index(_number(e)) + len(leaves))(*e.args))
    expr = expr.replace(lambda e: symbolic.load_index(e) is not None, lambda e: symbolic.tensor(_number(e) - len(leaves))(*e.args))
    return expr, [leaves[i] for i in used]


def _number(load: Any) -> int:
    index = symbolic.load_index(load)
    assert index is not None
    return index


def _with_scalars(expr: Any, graph: fx.Graph) -> tuple[Any, list[fx.Node]]:
    """Turn size symbols that lengths do not determine into S0, S1, ..., each the graph value that holds it."""
    free = sorted(expr.free_symbols - {B, H, Q, KV, Q_LEN, KV_LEN}, key=str)
    if not free:
        return expr, []
    holders: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        known = value(node)
        if hasattr(known, "node") and hasattr(known.node, "expr"):
            holders.setdefault(known.node.expr, node)
    for symbol in free:
        if symbol not in holders:
            raise Unreadable(f"no graph value holds {symbol}")
    return expr.subs({s: symbolic.scalar(i) for i, s in enumerate(free)}), [holders[s] for s in free]
