"""Drop what a rewrite made dead, above all N x N masks and repeated keys and values; nothing else is touched."""

from __future__ import annotations

from torch import fx

from stem_compile import ops
from stem_compile.passes.graph import memory, normalize

_OURS = (ops.OAM_SCORES, ops.TPD_SELECT)


def cleanup(graph: fx.Graph, roots: list[fx.Node]) -> list[fx.Node]:
    """Erase nodes above ``roots`` (former inputs of rewritten attentions) that lost their last user; returns what is
    left of them.

    Only operations known to be free of effects go: those of the vocabulary that do not write, and our own.
    """
    # A pass over several ranks' tokens has already erased what it left without users.
    frontier, erased = list(roots), set(roots) - set(graph.nodes)
    while frontier:
        node = frontier.pop()
        if node in erased or node.users or not _pure(node):
            continue
        inputs = list(node.all_input_nodes)
        graph.erase_node(node)
        erased.add(node)
        frontier.extend(inputs)
    return [n for n in roots if n not in erased]


def _pure(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    if memory.mutates(node):
        return memory.overwrites_privately(node)
    return node.target in _OURS or normalize.spelling(node) in normalize.SIGNATURES
