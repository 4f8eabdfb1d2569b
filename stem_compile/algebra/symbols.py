"""The symbols of masks, scores and budgets, and the loads from tensors.

``B, H, Q, KV`` are batch row, query head, query row and key position; ``Q_LEN, KV_LEN`` the lengths; ``S0, S1, ...``
ints known only when the graph runs; ``T0(...), T1(...)`` loads from tensors that the graph computes; ``SCORE`` the
scaled product q.k; ``ROW, BLOCKS`` a query block's rank and the number of key blocks, in budgets.
"""

from __future__ import annotations

import functools
from typing import Any

import sympy

B, H, Q, KV = sympy.symbols("b h q kv", integer=True, nonnegative=True)
Q_LEN, KV_LEN = sympy.symbols("q_len kv_len", integer=True, positive=True)
ROW, BLOCKS = sympy.symbols("row blocks", integer=True, nonnegative=True)
SCORE = sympy.Symbol("s", real=True)

LOADS = 16
"""Most tensors, and most scalars, of one attention."""


@functools.cache
def tensor(index: int) -> Any:
    """The load function of the site's mask tensor number ``index``: ``T0(b, kv)``."""
    return sympy.Function(f"T{index}", real=True)


@functools.cache
def scalar(index: int) -> sympy.Symbol:
    """The site's runtime scalar number ``index`` (an int known only when the graph runs)."""
    return sympy.Symbol(f"S{index}", integer=True)


def load_index(expr: sympy.Basic) -> int | None:
    """Number of the mask tensor that ``expr`` loads from, or None when it is not a load."""
    name = getattr(getattr(expr, "func", None), "__name__", "")
    return int(name[1:]) if name[:1] == "T" and name[1:].isdigit() else None


@functools.cache
def names() -> dict[str, Any]:
    """Text -> symbol or load function, for all that an expression may hold."""
    plain: dict[str, Any] = {str(s): s for s in (B, H, Q, KV, Q_LEN, KV_LEN, SCORE, ROW, BLOCKS)}
    return plain | {f"T{i}": tensor(i) for i in range(LOADS)} | {f"S{i}": scalar(i) for i in range(LOADS)}
