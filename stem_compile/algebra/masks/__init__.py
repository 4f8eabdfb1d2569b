"""Mask algebra: what an attention mask means, independent of how a graph builds it.

A mask says for (b, h, q, kv) whether query row q may see key kv. Terms have names that a model author knows; every term
is a sympy predicate underneath, so one definition serves the dense oracle (``dense``), block maps (``classify``),
kernels (printed as Triton by ``kernels/triton/codegen.py``) and words (``words``). A mask travels through FX graphs and
operator schemas as text: ``encode``/``decode``.

``mask.py`` holds what all masks share, ``terms.py`` the terms with a name. A term of one's own::

    @masks.register
    @dataclass(frozen=True)
    class Dilated(masks.Mask):
        \"\"\"Query and key are a multiple of ``step`` apart.\"\"\"

        step: int

        @classmethod
        def recognise(cls, expr):
            step = expr.lhs.args[1] if isinstance(expr, sympy.Eq) and isinstance(expr.lhs, sympy.Mod) else None
            return cls(int(step)) if step is not None and expr == cls(step).predicate else None

        @property
        def predicate(self):
            return sympy.Eq(sympy.Mod(Q - KV, self.step), 0)

        @property
        def words(self):
            return f"every {self.step}th key"
"""

from stem_compile.algebra.masks.mask import (
    And,
    Block,
    Full,
    Mask,
    Or,
    Predicate,
    decode,
    encode,
    environment,
    predicate,
    register,
    terms,
    unregister,
)
from stem_compile.algebra.masks.terms import Causal, Chunks, Documents, Given, Padding, Positions, Window

__all__ = [
    "And",
    "Block",
    "Causal",
    "Chunks",
    "Documents",
    "Full",
    "Given",
    "Mask",
    "Or",
    "Padding",
    "Positions",
    "Predicate",
    "Window",
    "decode",
    "encode",
    "environment",
    "predicate",
    "register",
    "terms",
    "unregister",
]
