"""Print masks and budgets as Triton and put them into a template.

A template is a real Triton file. Between its ``# generated: begin`` and ``# generated: end`` lines stand defaults: constants
(``NAME = tl.constexpr(...)``) and functions (``visible``, ``offset``, ``row_budget``). Codegen replaces exactly the names it finds there, so a
template says by its defaults what it needs. The rest of the file is copied as it is.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sympy
from sympy.logic.boolalg import BooleanFalse, BooleanTrue

from stem_compile import policies, selection, symbolic
from stem_compile.blocks import split
from stem_compile.kernels.spec import KernelSpec
from stem_compile.masks import Mask, decode
from stem_compile.symbolic import BLOCKS, KV, KV_LEN, Q_LEN, ROW, B, FloorDiv, H, Q, Where

BEGIN, END = "# generated: begin", "# generated: end"
TEMPLATES = Path(__file__).parent / "templates"

_INFIX: dict[Any, str] = {
    sympy.Le: "<=", sympy.Lt: "<", sympy.Ge: ">=", sympy.Gt: ">", sympy.Eq: "==", sympy.Ne: "!=",
    FloorDiv: "//", sympy.Mod: "%", sympy.Add: "+", sympy.Mul: "*", sympy.And: "&", sympy.Or: "|",
}  # fmt: skip
_NARY: dict[Any, str] = {sympy.Min: "minimum", sympy.Max: "maximum"}


def triton_expression(expr: Any, names: Mapping[Any, str], module: str = "tl") -> str:
    """``expr`` as Triton source. names: symbols -> variables. module: the language's name in the template (``tl``, Gluon's ``gl``).

    Loads become ``load<i>(index, ...)``. Integer division truncates in Triton: dividends must be nonnegative. Raises TypeError
    for a function outside ``symbolic``'s closed set.
    """
    if expr in names:
        return names[expr]
    if isinstance(expr, bool | BooleanTrue | BooleanFalse):
        return repr(bool(expr))
    if isinstance(expr, int | sympy.Integer):
        return str(int(expr)) if int(expr) >= 0 else f"({int(expr)})"
    # Sums and products in sympy's printing order, not its hash order: equal masks must give equal text.
    ordered = sorted(expr.args, key=sympy.default_sort_key) if isinstance(expr, sympy.And | sympy.Or | sympy.Min | sympy.Max) else expr.args
    if isinstance(expr, sympy.Add | sympy.Mul):
        ordered = expr.as_ordered_terms() if isinstance(expr, sympy.Add) else expr.as_ordered_factors()
    args = [triton_expression(a, names, module) for a in ordered]
    for kind, sign in _INFIX.items():
        if isinstance(expr, kind):
            return "(" + f" {sign} ".join(args) + ")"
    for kind, function in _NARY.items():
        if isinstance(expr, kind):
            return functools.reduce(lambda a, b: f"{module}.{function}({a}, {b})", args)
    if isinstance(expr, sympy.Not):
        return f"(not {args[0]})" if args[0] in ("True", "False") else f"(~{args[0]})"
    if isinstance(expr, Where):
        return f"{module}.where({', '.join(args)})"
    if isinstance(expr, sympy.Abs):
        return f"{module}.abs({args[0]})"
    if isinstance(expr, sympy.Pow) and expr.exp.is_Integer and expr.exp > 0:
        return "(" + " * ".join([args[0]] * int(expr.exp)) + ")"
    if (index := symbolic.load_index(expr)) is not None:
        return f"load{index}({', '.join(args)}, tensors, layouts)"
    raise TypeError(f"cannot print {expr.func} as Triton; extend stem_compile/kernels/codegen.py")


def _names(mask: Mask) -> dict[Any, str]:
    bound = {B: "b", H: "h", Q: "q", KV: "kv", Q_LEN: "q_len", KV_LEN: "kv_len"}
    scalars = {s for s in mask.predicate.free_symbols if s not in bound}
    return bound | {s: f"scalars[{s.name[1:]}]" for s in scalars}


def loads(mask: Mask) -> dict[int, int]:
    """Mask tensors that ``mask`` reads: number -> rank."""
    return {i: len(f.args) for f in mask.predicate.atoms(sympy.Function) if (i := symbolic.load_index(f)) is not None}


def is_general(mask: Mask) -> bool:
    """Whether a block below the causal line may hide scores, so that the predicate is evaluated in every block."""
    parts = split(mask)
    return bool(parts.bands or parts.keys or parts.others)


def _load_functions(mask: Mask, module: str, decorator: str) -> str:
    # layouts is flat: size and stride of each dimension, tensor after tensor. Reads clamp like masks.Mask.dense does.
    text, start = "", 0
    ranks = loads(mask)
    for tensor in range(max(ranks, default=-1) + 1):
        rank = ranks.get(tensor, 0)
        index = [f"i{n}" for n in range(rank)]
        terms = [f"{module}.minimum({module}.maximum({i}, 0), layouts[{start + 2 * n}] - 1) * layouts[{start + 2 * n + 1}]" for n, i in enumerate(index)]
        if rank:
            text += f"{decorator}\ndef load{tensor}({', '.join(index)}, tensors, layouts):\n"
            text += f"    return {module}.load(tensors[{tensor}] + {' + '.join(terms)})\n\n\n"
        start += 2 * rank
    return text


def _visible(mask: Mask, module: str, decorator: str) -> str:
    value = triton_expression(mask.predicate, _names(mask), module)
    value = {"True": "(kv >= 0)", "False": "(kv < 0)"}.get(value, value)
    return (
        _load_functions(mask, module, decorator)
        + f"{decorator}\ndef visible(b, h, q, kv, q_len, kv_len, tensors, layouts, scalars):\n    # {mask.words}\n    return {value}\n"
    )


def _offset(mask: Mask, module: str, decorator: str) -> str:
    causal = split(mask).causal
    value = "0" if causal is None else triton_expression(sympy.sympify(causal.offset), _names(mask), module)
    return f"{decorator}\ndef offset(q_len, kv_len, scalars):\n    return {value}\n"


def _row_budget(spec: KernelSpec, module: str, decorator: str) -> str:
    chosen = selection.parse(spec.selection)
    value = triton_expression(policies.get(chosen.policy).budget(chosen), {ROW: "row", BLOCKS: "blocks"}, module)
    return f"{decorator}\ndef row_budget(row, blocks):\n    # policy {chosen.policy}, budget {chosen.budget}, mu {chosen.mu}\n    return {value}\n"


def constants(spec: KernelSpec) -> dict[str, object]:
    """Values of the constants a template may declare."""
    mask, chosen = decode(spec.mask), selection.parse(spec.selection)
    return {
        "HEAD_DIM": spec.head_dim,
        "VALUE_DIM": spec.value_dim,
        "BLOCK_Q": spec.block_q,
        "BLOCK_K": spec.block_k,
        "CAUSAL": split(mask).causal is not None,
        "GENERAL": is_general(mask),
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
    mask = decode(spec.mask)
    values = constants(spec)
    functions = {
        "visible": lambda: _visible(mask, module, decorator),
        "offset": lambda: _offset(mask, module, decorator),
        "row_budget": lambda: _row_budget(spec, module, decorator),
    }
    lines, parts = [], []
    for node in ast.parse(defaults).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            lines.append(f"{name} = {module}.constexpr({values[name]!r})\n")
        elif isinstance(node, ast.FunctionDef):
            parts.append(functions[node.name]())
    body = "\n\n".join(["".join(lines), *parts])
    head = f"# Generated by stem_compile/kernels/codegen.py from templates/{spec.template}.py; do not edit.\n{spec.header}"
    return f"{head}{before}{BEGIN}\n{body}{END}\n{after}"
