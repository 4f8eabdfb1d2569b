"""Print masks and budgets as Triton and put them into a template.

A template is a real Triton file. Between its ``# generated: begin`` and ``# generated: end`` lines stand defaults:
constants (``NAME = tl.constexpr(...)``) and functions (``visible``, ``lowest``, ``score``, ...). Codegen replaces
exactly the names it finds there, so a template says by its defaults what it needs; helpers that the printed expressions
call come before them. The rest of the file is copied as it is.
"""

from __future__ import annotations

import ast
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import sympy
from sympy.logic.boolalg import BooleanFalse, BooleanTrue

from stem_compile import selection
from stem_compile.algebra import functions, symbolic
from stem_compile.algebra.blocks import split
from stem_compile.algebra.masks import Mask, decode
from stem_compile.algebra.scores import Score
from stem_compile.algebra.scores import decode as decode_score
from stem_compile.algebra.symbolic import (
    BLOCKS,
    KV,
    KV_LEN,
    Q_LEN,
    ROW,
    SCORE,
    B,
    H,
    Q,
)
from stem_compile.kernels.spec import KernelSpec
from stem_compile.kernels.triton.template import TEMPLATES
from stem_compile.selection import policies

BEGIN, END = "# generated: begin", "# generated: end"

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
    "long": (
        """def long(x):
    if x.dtype.is_int():
        x = {tl}.cast(x, {tl}.int64)
    return x
"""
    ),
    # To nearest, ties to even, in whole numbers: the same on every device, and nothing that a compiler fuses.
    "to_bfloat16": (
        """def to_bfloat16(x):
    bits = {tl}.cast(x, {tl}.int32, bitcast=True)
    nearest = {tl}.cast((bits + 32767 + ((bits >> 16) & 1)) & -65536, {tl}.float32, bitcast=True)
    return {tl}.where(x == x, nearest, x)
"""
    ),
    "unfused": (
        """def unfused(x, length):
    bits = {tl}.cast(x, {tl}.int32, bitcast=True) | {tl}.minimum(length, 0)
    return {tl}.cast(bits, {tl}.float32, bitcast=True)
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

    Loads become ``load<i>(index, ..., tensors, layouts)``. Integer division floors, as in Python; whole numbers that
    may leave int32 are computed in 64 bits. Raises OutsideAlgebra (a TypeError) for a function outside the table.
    """
    if expr in names:
        return names[expr]
    if isinstance(expr, bool | BooleanTrue | BooleanFalse):
        return repr(bool(expr))
    if isinstance(expr, int | sympy.Integer):
        return str(int(expr)) if int(expr) >= 0 else f"({int(expr)})"
    if (index := symbolic.load_index(expr)) is not None:
        places = [*(triton_expression(a, names, module) for a in expr.args), "tensors", "layouts"]
        return f"load{index}({', '.join(places)})"
    if expr.is_number:
        return _number(float(expr))
    row = functions.row_of(expr)
    if row is None:
        symbolic.check(expr)
        raise KeyError(f"{expr} has no name here; named are {sorted(map(str, names))}")
    operands = _ordered(expr)
    arguments = tuple(triton_expression(a, names, module) for a in operands)
    call = functions.Call(expr, operands, arguments, module, _is_wide(expr), names.get(Q_LEN))
    if isinstance(row.triton, str):
        return row.triton.format(*call.arguments, tl=module)
    return row.triton(call)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return f"float('{value}')"
    return repr(value) if value >= 0 else f"({value!r})"


def _ordered(expr: Any) -> tuple[Any, ...]:
    """Arguments in sympy's printing order, not its hash order: equal masks must give equal text."""
    if isinstance(expr, sympy.And | sympy.Or | sympy.Xor | sympy.Min | sympy.Max):
        return tuple(sorted(expr.args, key=sympy.default_sort_key))
    if isinstance(expr, sympy.Add):
        return tuple(expr.as_ordered_terms())
    return tuple(expr.as_ordered_factors()) if isinstance(expr, sympy.Mul) else tuple(expr.args)


LONGEST = 1 << 24
"""Tokens up to which generated arithmetic on positions is exact."""
LARGEST_SCALAR = 1 << 30
"""Magnitude that a runtime scalar stays below: with a position added it still is an int32."""


@functools.lru_cache(maxsize=4096)
def _is_wide(expr: Any) -> bool:
    """Whether a sum, product or power of whole numbers may leave int32, in which kernels hold positions (``ROW`` and
    ``BLOCKS`` are 64 bits wide)."""
    if not isinstance(expr, sympy.Add | sympy.Mul | sympy.Pow) or expr.free_symbols & {ROW, BLOCKS, SCORE}:
        return False
    rows = (functions.row_of(part) for part in sympy.preorder_traversal(expr) if part is not expr)
    if any(not n.is_Integer for n in expr.atoms(sympy.Number)) or any(r and r.gives is functions.REAL for r in rows):
        return False
    limits = {s: LARGEST_SCALAR if s.name.startswith("S") else LONGEST for s in expr.free_symbols}
    box: dict[Any, Any] = {s: (-n if s.name.startswith("S") else 0, n) for s, n in limits.items()}
    box |= {symbolic.tensor(i): lambda *_: (-(1 << 31), (1 << 31) - 1) for i in _loads(expr)}
    low, high = symbolic.bounds(expr, box)
    return bool(low < -(1 << 31) or high >= 1 << 31)


def _names(*exprs: Any) -> dict[Any, str]:
    bound = {B: "b", H: "h", Q: "q", KV: "kv", Q_LEN: "q_len", KV_LEN: "kv_len", SCORE: "s"}
    return bound | {s: f"scalars[{s.name[1:]}]" for e in exprs for s in e.free_symbols if s not in bound}


def _names_in(head: str, expr: Any) -> dict[Any, str]:
    """The names that a function of this signature has."""
    parameters = set(re.findall(r"\w+", head.partition("(")[2]))
    return {s: name for s, name in _names(expr).items() if name.partition("[")[0] in parameters}


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
    return all(band.is_interval and (band.near is None or _reaches(band, causal)) for band in bands)


def _reaches(band: Mask, causal: Any) -> bool:
    return causal is not None and band.reaches(causal)


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
        if KV not in mask.predicate.free_symbols and mask.predicate.free_symbols:
            value = f"((kv >= 0) & {value})"
    return (
        f"def visible(b, h, q, kv, q_len, kv_len, tensors, layouts, scalars):\n    # {mask.words}\n    return {value}\n"
    )


def _position(head: str, expr: Any, module: str) -> str:
    """Function of a key's position; one that a tensor holds, or one beyond int32, is an int64."""
    value = triton_expression(expr, _names_in(head, expr), module)
    if _loads(expr) or any(_is_wide(part) for part in sympy.preorder_traversal(expr)):
        value = f"{module}.minimum({module}.maximum({value}, -1073741824), 1073741824).to({module}.int32)"
    return f"def {head}:\n    return {value}\n"


def _real(head: str, expr: Any, module: str, comment: str) -> str:
    return (
        f"def {head}:\n"
        + (f"    # {comment}\n" if comment else "")
        + f"    return {triton_expression(expr, _names_in(head, expr), module)}\n"
    )


def _row_budget(kernel_spec: KernelSpec, module: str) -> str:
    spec = selection.parse(kernel_spec.selection)
    value = triton_expression(policies.get(spec.policy).budget(spec), {ROW: "row", BLOCKS: "blocks"}, module)
    return (
        f"def row_budget(row, blocks):\n    # policy {spec.policy}, budget {spec.budget}, mu {spec.mu}\n   "
        f" return {value}\n"
    )


def constants(kernel_spec: KernelSpec) -> dict[str, object]:
    """Values of the constants a template may declare."""
    mask, spec, score = (
        decode(kernel_spec.mask),
        selection.parse(kernel_spec.selection),
        decode_score(kernel_spec.score),
    )
    parts = split(mask)
    return {
        "HEAD_DIM": kernel_spec.head_dim,
        "VALUE_DIM": kernel_spec.value_dim,
        "BLOCK_Q": kernel_spec.block_q,
        "BLOCK_K": kernel_spec.block_k,
        "CAUSAL": parts.causal is not None,
        "GENERAL": is_general(mask),
        "BANDED": bool(parts.bands),
        "EDGES": only_edges(mask),
        "MODIFIED": score.modified,
        "SINK": score.sink is not None,
        # Weights have the exponents of float32.
        "FIXED": kernel_spec.dtype != "fp16",
        # float32 products in three tf32 passes: exact to about 1e-6, on tensor cores.
        "PRECISION": "tf32x3" if kernel_spec.dtype == "fp32" else "tf32",
        "STRIDE": min(spec.stride, kernel_spec.block_q, kernel_spec.block_k),
        "GROUP_Q": spec.group_sizes[0],
        "GROUP_K": spec.group_sizes[1],
        "KEPT": spec.kept_share,
        "COVERED": spec.coverage is not None,
        "COVERAGE": 1.0 if spec.coverage is None else spec.coverage,
        "SINKS": spec.sinks,
        "LOCALS": spec.locals,
        "SLACK": -(-spec.block_k // spec.block_q) + 1,
        "PROMPT_BLOCKS": -(-spec.prompt_length // spec.block_k),
    }


def _with_helpers(parts: list[str], ranks: Mapping[int, int], module: str, decorator: str) -> list[str]:
    """Sources of functions, each under ``decorator``, behind those of the loads and helpers that they call."""
    called = {name for part in parts for name in re.findall(r"\b(\w+)\(", part)}
    helpers = [text.format(tl=module) for name, text in _HELPERS.items() if name in called]
    return [f"{decorator}\n{part}" for part in [*_load_functions(ranks, called, module), *helpers, *parts]]


def functions_source(exprs: Mapping[str, Any]) -> str:
    """Source of a Triton module with one function of ``(s, b, h, q, kv, q_len, kv_len, tensors, layouts, scalars)``
    for every expression, by name: what templates call ``visible`` or ``score``."""
    head = "(s, b, h, q, kv, q_len, kv_len, tensors, layouts, scalars)"
    parts = [f"def {name}{head}:\n    return {triton_expression(e, _names(e), 'tl')}\n" for name, e in exprs.items()]
    ranks = {i: rank for e in exprs.values() for i, rank in _loads(e).items()}
    functions = _with_helpers(parts, ranks, "tl", "@triton.jit")
    return "\n\n".join(["import triton\nimport triton.language as tl\n", *functions])


def _functions(mask: Mask, score: Score, module: str) -> dict[str, Callable[[], str]]:
    """Sources of what a mask and a score mean, by the name that templates call them."""
    causal, lowest = split(mask).causal, split(mask).far
    return {
        "visible": lambda: _visible(mask, module),
        "offset": lambda: _position(
            "offset(q_len, kv_len, tensors, layouts, scalars)",
            sympy.sympify(0 if causal is None else causal),
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
    }


def printed(mask: Mask, score: Score) -> str:
    """What a generated module says of a mask and a score. Raises where one of them cannot be printed: OutsideAlgebra,
    or KeyError for a symbol that the function in question does not get."""
    parts = [write() for write in _functions(mask, score, "tl").values()]
    source = "\n\n".join(_with_helpers(parts, loads(mask, score), "tl", "@triton.jit"))
    ast.parse(source)
    return source


def generate(kernel_spec: KernelSpec) -> str:
    """Source of ``kernel_spec``'s module. A pure function of the kernel_spec and the template file."""
    template = TEMPLATES.get(kernel_spec.template).source()
    before, _, rest = template.partition(BEGIN + "\n")
    defaults, marker, after = rest.partition(END + "\n")
    if not marker:
        raise ValueError(f"template {kernel_spec.template} has no region {BEGIN!r} to {END!r}")
    module, decorator = ("gl", "@gluon.jit") if "import gluon" in before else ("tl", "@triton.jit")
    mask, score = decode(kernel_spec.mask), decode_score(kernel_spec.score)
    values = constants(kernel_spec)
    functions = _functions(mask, score, module) | {"row_budget": lambda: _row_budget(kernel_spec, module)}
    lines, parts = [], []
    for node in ast.parse(defaults).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            lines.append(f"{name} = {module}.constexpr({values[name]!r})\n")
        elif isinstance(node, ast.FunctionDef):
            parts.append(functions[node.name]())
    parts = _with_helpers(parts, loads(mask, score), module, decorator)
    body = "\n\n".join(["".join(lines), *parts])
    source = f"templates/{kernel_spec.template}.py"
    head = f"# Generated by stem_compile/kernels/triton/codegen.py from {source}; do not edit.\n{kernel_spec.header}"
    return f"{head}{before}{BEGIN}\n{body}{END}\n{after}"
