"""Print masks and budgets as Triton and put them into a template.

A template is a real Triton file. Between its ``# generated: begin`` and ``# generated: end`` lines stand defaults:
constants (``NAME = tl.constexpr(...)``) and functions (``visible``, ``lowest``, ``score``, ...). Codegen replaces
exactly the names it finds there, so a template says by its defaults what it needs; helpers that the printed expressions
call come before them. The rest of the file is copied as it is.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sympy
from sympy.logic.boolalg import BooleanFalse, BooleanTrue

from stem_compile import selection
from stem_compile.algebra import symbolic
from stem_compile.algebra.blocks import split
from stem_compile.algebra.masks import Chunks, Mask, Window, decode
from stem_compile.algebra.scores import Score
from stem_compile.algebra.scores import decode as decode_score
from stem_compile.algebra.symbolic import (
    BLOCKS,
    KV,
    KV_LEN,
    Q_LEN,
    REAL_FUNCTIONS,
    ROW,
    SCORE,
    B,
    FloorDiv,
    H,
    Q,
    Where,
)
from stem_compile.kernels.spec import KernelSpec
from stem_compile.selection import policies

BEGIN, END = "# generated: begin", "# generated: end"
TEMPLATES = Path(__file__).parent / "templates"

_INFIX: dict[Any, str] = {
    sympy.Le: "<=",
    sympy.Lt: "<",
    sympy.Ge: ">=",
    sympy.Gt: ">",
    sympy.Eq: "==",
    sympy.Ne: "!=",
    sympy.Add: "+",
    sympy.Mul: "*",
    sympy.And: "&",
    sympy.Or: "|",
}
_NARY: dict[Any, str] = {sympy.Min: "minimum", sympy.Max: "maximum"}


_HELPERS = {
    "floordiv": (
        """def floordiv(a, b):
    quotient = a // b  # Triton rounds to 0
    return {tl}.where(quotient * b > a, quotient - 1, quotient)
"""
    ),
    "floormod": (
        """def floormod(a, b):
    rest = a % b  # Triton gives it the sign of a
    return {tl}.where(rest < 0, rest + b, rest)
"""
    ),
    # Both branches keep the relative error below 2^-20, and so the absolute one of a capped score at what fp32 allows
    # at the cap.
    "tanh": (
        """def tanh(x):
    square = x * x
    near = x + x * square * (square * 0.13333333333333333 - 0.3333333333333333)
    fall = {tl}.exp({tl}.abs(x) * -2.0)
    far = (1.0 - fall) / (1.0 + fall)
    return {tl}.where(square < 0.01, near, {tl}.where(x < 0.0, -far, far))
"""
    ),
}
"""Functions that printed expressions call, by name; a module holds those that it uses."""


def triton_expression(expr: Any, names: Mapping[Any, str], module: str = "tl") -> str:
    """``expr`` as Triton source. names: symbols -> variables. module: the language's name in the template (``tl``,
    Gluon's ``gl``).

    Loads become ``load<i>(index, ..., tensors, layouts)``. Integer division floors, as in Python. Raises TypeError for
    a function outside
    ``symbolic``'s closed set.
    """
    if expr in names:
        return names[expr]
    if isinstance(expr, bool | BooleanTrue | BooleanFalse):
        return repr(bool(expr))
    if isinstance(expr, int | sympy.Integer):
        return str(int(expr)) if int(expr) >= 0 else f"({int(expr)})"
    if (index := symbolic.load_index(expr)) is not None:
        arguments = [*(triton_expression(a, names, module) for a in expr.args), "tensors", "layouts"]
        return f"load{index}({', '.join(arguments)})"
    if expr.is_number:
        return repr(float(expr)) if float(expr) >= 0 else f"({float(expr)!r})"
    # Sums and products in sympy's printing order, not its hash order: equal masks must give equal text.
    ordered = (
        sorted(expr.args, key=sympy.default_sort_key)
        if isinstance(expr, sympy.And | sympy.Or | sympy.Min | sympy.Max)
        else expr.args
    )
    if isinstance(expr, sympy.Add | sympy.Mul):
        ordered = expr.as_ordered_terms() if isinstance(expr, sympy.Add) else expr.as_ordered_factors()
    args = [triton_expression(a, names, module) for a in ordered]
    for kind, sign in _INFIX.items():
        if isinstance(expr, kind):
            return "(" + f" {sign} ".join(args) + ")"
    for kind, function in _NARY.items():
        if isinstance(expr, kind):
            return functools.reduce(lambda a, b: f"{module}.{function}({a}, {b})", args)
    if isinstance(expr, FloorDiv | sympy.Mod):
        return _division(expr, *args)
    if isinstance(expr, sympy.Not):
        return f"(not {args[0]})" if args[0] in ("True", "False") else f"(~{args[0]})"
    if isinstance(expr, Where):
        return f"{module}.where({', '.join(args)})"
    if isinstance(expr, sympy.Abs):
        return f"{module}.abs({args[0]})"
    if expr.func in REAL_FUNCTIONS:
        name = REAL_FUNCTIONS[expr.func]
        return f"{name}({args[0]})" if name in _HELPERS else f"{module}.{name}({args[0]})"
    if isinstance(expr, sympy.Pow) and expr.exp.is_number:
        return _power(args[0], expr.exp, module)
    raise TypeError(f"cannot print {expr.func} as Triton; extend stem_compile/algebra/symbolic.py")


def _division(expr: Any, a: str, b: str) -> str:
    """Floor division or remainder by a positive number. Triton's own round to 0, which is the same for dividends that
    are not negative."""
    divides, divisor = isinstance(expr, FloorDiv), expr.args[1]
    if expr.args[0].is_nonnegative:
        return f"({a} {'//' if divides else '%'} {b})"
    if divisor.is_Integer and int(divisor).bit_count() == 1:
        return f"({a} >> {int(divisor).bit_length() - 1})" if divides else f"({a} & {int(divisor) - 1})"
    return f"{'floordiv' if divides else 'floormod'}({a}, {b})"


def _power(base: str, exponent: Any, module: str) -> str:
    size = abs(exponent)
    if size.is_Integer:
        value = "(" + " * ".join([base] * int(size)) + ")"
    elif size == sympy.Rational(1, 2):
        value = f"{module}.sqrt({base})"
    else:
        value = f"{module}.exp2({float(size)!r} * {module}.log2({base}))"
    return f"(1.0 / {value})" if exponent < 0 else value


def _names(*exprs: Any) -> dict[Any, str]:
    bound = {B: "b", H: "h", Q: "q", KV: "kv", Q_LEN: "q_len", KV_LEN: "kv_len", SCORE: "s"}
    return bound | {s: f"scalars[{s.name[1:]}]" for e in exprs for s in e.free_symbols if s not in bound}


def _loads(expr: Any) -> dict[int, int]:
    return {i: len(f.args) for f in expr.atoms(sympy.Function) if (i := symbolic.load_index(f)) is not None}


def loads(mask: Mask, score: Score | None = None) -> dict[int, int]:
    """Tensors that ``mask`` and ``score`` read: number -> rank."""
    read = _loads(mask.predicate)
    for expr in () if score is None else (score.expr, score.sink):
        read |= {} if expr is None else _loads(expr)
    return read


def is_general(mask: Mask) -> bool:
    """Whether a block below the causal line may hide scores, so that the predicate is evaluated in every block."""
    parts = split(mask)
    return bool(parts.bands or parts.keys or parts.others)


def only_edges(mask: Mask) -> bool:
    """Whether query q sees exactly the keys from its ``lowest`` to its causal limit, so that only the blocks on the two
    edges hide scores."""
    causal, bands, keys, others = split(mask)
    if not bands or keys or others:
        return False
    # The end of a chunk lies beyond the causal limit where both count the same positions.
    chunks = [band for band in bands if isinstance(band, Chunks)]
    within = causal is not None and all(
        sympy.expand(causal.offset + c.kv_shift - c.q_shift).is_nonpositive for c in chunks
    )
    return all(isinstance(band, Window | Chunks) for band in bands) and (within or not chunks)


def _load_functions(ranks: Mapping[int, int], called: set[str], module: str) -> list[str]:
    # layouts is flat: size and stride of each dimension, tensor after tensor. Reads clamp like masks.Mask.dense does.
    functions, start = [], 0
    for tensor, rank in sorted(ranks.items()):
        # A matrix for every head or batch row may have more than 2^31 elements.
        wide = f".to({module}.int64)" if rank > 2 else ""
        where = [
            f" + {module}.minimum({module}.maximum(i{n}, 0), layouts[{start + 2 * n}] - 1){wide} *"
            f" layouts[{start + 2 * n + 1}]"
            for n in range(rank)
        ]
        start += 2 * rank
        if f"load{tensor}" in called:
            head = ", ".join([*(f"i{n}" for n in range(rank)), "tensors", "layouts"])
            functions.append(
                f"def load{tensor}({head}):\n    value = {module}.load(tensors[{tensor}]{''.join(where)})\n    if"
                f" value.dtype.is_floating():\n        value = value.to({module}.float32)\n    elif"
                " value.dtype.primitive_bitwidth == 8 or value.dtype.primitive_bitwidth == 16:\n        value ="
                f" value.to({module}.int32)\n    return value\n"
            )
    return functions


def _visible(mask: Mask, module: str) -> str:
    if only_edges(mask):
        # Two comparisons of 32-bit positions, where a chunk's own predicate divides twice.
        value = "kv >= lowest(b, q, q_len, kv_len, tensors, layouts, scalars)"
        if split(mask).causal is not None:
            value = f"(kv <= q + offset(q_len, kv_len, tensors, layouts, scalars)) & ({value})"
    else:
        value = triton_expression(mask.predicate, _names(mask.predicate), module)
        value = {"True": "(kv >= 0)", "False": "(kv < 0)"}.get(value, value)
    return (
        f"def visible(b, h, q, kv, q_len, kv_len, tensors, layouts, scalars):\n    # {mask.words}\n    return {value}\n"
    )


def _position(head: str, expr: Any, module: str) -> str:
    """Function of a key's position; one that a tensor holds may be an int64."""
    value = triton_expression(expr, _names(expr), module)
    if _loads(expr):
        value = f"{module}.minimum({module}.maximum({value}, -1073741824), 1073741824).to({module}.int32)"
    return f"def {head}:\n    return {value}\n"


def _real(head: str, expr: Any, module: str, comment: str) -> str:
    return (
        f"def {head}:\n"
        + (f"    # {comment}\n" if comment else "")
        + f"    return {triton_expression(expr, _names(expr), module)}\n"
    )


def _row_budget(spec: KernelSpec, module: str) -> str:
    chosen = selection.parse(spec.selection)
    value = triton_expression(policies.get(chosen.policy).budget(chosen), {ROW: "row", BLOCKS: "blocks"}, module)
    return (
        f"def row_budget(row, blocks):\n    # policy {chosen.policy}, budget {chosen.budget}, mu {chosen.mu}\n   "
        f" return {value}\n"
    )


def constants(spec: KernelSpec) -> dict[str, object]:
    """Values of the constants a template may declare."""
    mask, chosen, score = decode(spec.mask), selection.parse(spec.selection), decode_score(spec.score)
    parts = split(mask)
    return {
        "HEAD_DIM": spec.head_dim,
        "VALUE_DIM": spec.value_dim,
        "BLOCK_Q": spec.block_q,
        "BLOCK_K": spec.block_k,
        "CAUSAL": parts.causal is not None,
        "GENERAL": is_general(mask),
        "BANDED": bool(parts.bands),
        "EDGES": only_edges(mask),
        "MODIFIED": score.modified,
        "SINK": score.sink is not None,
        # Weights have the exponents of float32.
        "FIXED": spec.dtype != "fp16",
        # float32 products in three tf32 passes: exact to about 1e-6, on tensor cores.
        "PRECISION": "tf32x3" if spec.dtype == "fp32" else "tf32",
        "STRIDE": min(chosen.stride, spec.block_q, spec.block_k),
        "SINKS": chosen.sinks,
        "LOCALS": chosen.locals,
        "SLACK": -(-chosen.block_k // chosen.block_q) + 1,
        "PROMPT_BLOCKS": -(-chosen.prompt_length // chosen.block_k),
    }


def generate(spec: KernelSpec) -> str:
    """Source of ``spec``'s module. A pure function of the spec and the template file."""
    template = (TEMPLATES / f"{spec.template}.py").read_text()
    before, _, rest = template.partition(BEGIN + "\n")
    defaults, found, after = rest.partition(END + "\n")
    if not found:
        raise ValueError(f"template {spec.template} has no region {BEGIN!r} to {END!r}")
    module, decorator = ("gl", "@gluon.jit") if "import gluon" in before else ("tl", "@triton.jit")
    mask, score = decode(spec.mask), decode_score(spec.score)
    values = constants(spec)
    causal, lowest = split(mask).causal, split(mask).lowest
    functions = {
        "visible": lambda: _visible(mask, module),
        "offset": lambda: _position(
            "offset(q_len, kv_len, tensors, layouts, scalars)",
            sympy.sympify(0 if causal is None else causal.offset),
            module,
        ),
        "lowest": lambda: _position(
            "lowest(b, q, q_len, kv_len, tensors, layouts, scalars)",
            sympy.sympify(0 if lowest is None else lowest),
            module,
        ),
        "score": lambda: _real(
            "score(s, b, h, q, kv, q_len, kv_len, tensors, layouts, scalars)", score.expr, module, score.words
        ),
        "sink": lambda: _real(
            "sink(b, h, tensors, layouts, scalars)", sympy.Float(0) if score.sink is None else score.sink, module, ""
        ),
        "row_budget": lambda: _row_budget(spec, module),
    }
    lines, parts = [], []
    for node in ast.parse(defaults).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            lines.append(f"{name} = {module}.constexpr({values[name]!r})\n")
        elif isinstance(node, ast.FunctionDef):
            parts.append(functions[node.name]())
    called = {name for part in parts for name in re.findall(r"\b(\w+)\(", part)}
    helpers = [text.format(tl=module) for name, text in _HELPERS.items() if name in called]
    parts = [
        f"{decorator}\n{part}" for part in [*_load_functions(loads(mask, score), called, module), *helpers, *parts]
    ]
    body = "\n\n".join(["".join(lines), *parts])
    source = f"templates/{spec.template}.py"
    head = f"# Generated by stem_compile/kernels/triton/codegen.py from {source}; do not edit.\n{spec.header}"
    return f"{head}{before}{BEGIN}\n{body}{END}\n{after}"
