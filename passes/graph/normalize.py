"""One vocabulary for Dynamo's graph: the function, method and operator spellings of an operation are one operation,
with arguments bound by name.

Nothing is rewritten: ``read(node)`` is a view. Matching here, before decomposition, is what keeps patterns short:
scaled_dot_product_attention is one node, and a mask is still written in the words of the model's author. (A retrace
with make_fx gives cleaner ATen, but fails on real
models under dynamic shapes: aten._local_scalar_dense.)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from stem_compile.passes.graph import schemas


@dataclass(frozen=True)
class Op:
    """One canonical operation. args: parameter name -> node or constant, defaults filled in."""

    name: str
    args: dict[str, Any]

    def __getitem__(self, parameter: str) -> Any:
        return self.args[parameter]


@dataclass(frozen=True)
class Parameter:
    """One parameter of an operation. variadic: collects a shape or dims given loose or as one sequence."""

    name: str
    default: Any
    variadic: bool = False


REQUIRED = object()
"""Marks a parameter without a default."""


def signature(*required: str, **defaults: Any) -> tuple[Parameter, ...]:
    """Parameters in order: those without a default by name, "*name" for a variadic one, then those with one."""
    plain = (Parameter(name.lstrip("*"), REQUIRED, name.startswith("*")) for name in required)
    return (*plain, *(Parameter(name, default) for name, default in defaults.items()))


SIGNATURES: dict[str, tuple[Parameter, ...]] = {
    "add": signature("input", "other", alpha=1),
    "sub": signature("input", "other", alpha=1),
    "mul": signature("input", "other"),
    "truediv": signature("input", "other", rounding_mode=None),
    "floordiv": signature("input", "other"),
    "mod": signature("input", "other"),
    "neg": signature("input"),
    "pow": signature("input", "exponent"),
    "abs": signature("input"),
    "le": signature("input", "other"),
    "lt": signature("input", "other"),
    "ge": signature("input", "other"),
    "gt": signature("input", "other"),
    "eq": signature("input", "other"),
    "ne": signature("input", "other"),
    "and": signature("input", "other"),
    "or": signature("input", "other"),
    "xor": signature("input", "other"),
    "not": signature("input"),
    "minimum": signature("input", "other"),
    "maximum": signature("input", "other"),
    "clamp": signature("input", min=None, max=None),
    "getitem": signature("input", "index"),
    "arange": signature("*bounds", dtype=None, device=None),
    "ones": signature("*size", dtype=None, device=None),
    "zeros": signature("*size", dtype=None, device=None),
    "full": signature("size", "fill_value", dtype=None, device=None),
    "empty": signature("*size", dtype=None, device=None),
    "empty_like": signature("input", dtype=None),
    "new_empty": signature("input", "*size", dtype=None, device=None),
    "fill": signature("input", "value"),
    "zero": signature("input"),
    "new_ones": signature("input", "*size", dtype=None, device=None),
    "new_zeros": signature("input", "*size", dtype=None, device=None),
    "new_full": signature("input", "size", "fill_value", dtype=None),
    "ones_like": signature("input", dtype=None),
    "zeros_like": signature("input", dtype=None),
    "full_like": signature("input", "fill_value", dtype=None),
    "tensor": signature("data", dtype=None, device=None),
    "scalar_tensor": signature("data", dtype=None, device=None),
    "unsqueeze": signature("input", "dim"),
    "squeeze": signature("input", "*dim"),
    "transpose": signature("input", "dim0", "dim1"),
    "permute": signature("input", "*dims"),
    "t": signature("input"),
    "view": signature("input", "*size"),
    "reshape": signature("input", "*size"),
    "expand": signature("input", "*size"),
    "expand_as": signature("input", "other"),
    "flatten": signature("input", start_dim=0, end_dim=-1),
    "repeat": signature("input", "*size"),
    "repeat_interleave": signature("input", "repeats", dim=None),
    "unflatten": signature("input", "dim", "sizes"),
    "contiguous": signature("input"),
    "clone": signature("input"),
    "detach": signature("input"),
    "alias": signature("input"),
    "to": signature("input", target=None, dtype=None, device=None),
    "bool": signature("input"),
    "long": signature("input"),
    "int": signature("input"),
    "float": signature("input"),
    "half": signature("input"),
    "double": signature("input"),
    "type": signature("input", dtype=None),
    "type_as": signature("input", "other"),
    "where": signature("condition", "input", "other"),
    "masked_fill": signature("input", "mask", "value"),
    "tril": signature("input", diagonal=0),
    "triu": signature("input", diagonal=0),
    "cumsum": signature("input", "dim", dtype=None),
    "diff": signature("input", n=1, dim=-1, prepend=None, append=None),
    "cat": signature("tensors", dim=0),
    "stack": signature("tensors", dim=0),
    "all": signature("input", dim=None, keepdim=False),
    "any": signature("input", dim=None, keepdim=False),
    "sum": signature("input", dim=None, keepdim=False),
    "size": signature("input", dim=None),
    "numel": signature("input"),
    "sigmoid": signature("input"),
    "logsumexp": signature("input", "dim", keepdim=False),
    "tanh": signature("input"),
    "exp": signature("input"),
    "log": signature("input"),
    "sqrt": signature("input"),
    "rsqrt": signature("input"),
    "flip": signature("input", "*dims"),
    "select": signature("input", "dim", "index"),
    "narrow": signature("input", "dim", "start", "length"),
    "max": signature("input", dim=None, keepdim=False),
    "amax": signature("input", dim=None, keepdim=False),
    "nan_to_num": signature("input", nan=None, posinf=None, neginf=None),
    "bfloat16": signature("input"),
    "matmul": signature("input", "other"),
    "bmm": signature("input", "other"),
    "baddbmm": signature("input", "batch1", "batch2", beta=1, alpha=1),
    "mm": signature("input", "other"),
    "addmm": signature("input", "batch1", "batch2", beta=1, alpha=1),
    "linear": signature("input", "weight", bias=None),
    "inner": signature("input", "other"),
    "tensordot": signature("input", "other", dims=2),
    "einsum": signature("equation", "*operands"),
    "softmax": signature("input", dim=None, dtype=None),
    "log_softmax": signature("input", dim=None, dtype=None),
    "pad": signature("input", "pad", mode="constant", value=None),
    "relu": signature("input", inplace=False),
    "leaky_relu": signature("input", negative_slope=0.01, inplace=False),
    "hardtanh": signature("input", min_val=-1.0, max_val=1.0, inplace=False),
    "silu": signature("input", inplace=False),
    "square": signature("input"),
    "reciprocal": signature("input"),
    "log1p": signature("input"),
    "expm1": signature("input"),
    "dropout": signature("input", p=0.5, training=True, inplace=False),
    "view_as": signature("input", "other"),
    "reshape_as": signature("input", "other"),
    "flex_attention": signature(
        "query",
        "key",
        "value",
        "score_mod",
        "block_mask",
        "scale",
        kernel_options=None,
        score_mod_other_buffers=(),
        mask_mod_other_buffers=(),
    ),
    "sdpa": signature(
        "query", "key", "value", attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ),
}
"""The vocabulary: canonical name of an operation -> its parameters."""

_ALIASES = {
    "logical_and": "and",
    "logical_or": "or",
    "logical_not": "not",
    "logical_xor": "xor",
    "bitwise_and": "and",
    "bitwise_or": "or",
    "bitwise_not": "not",
    "bitwise_xor": "xor",
    "invert": "not",
    "inv": "not",
    "less_equal": "le",
    "less": "lt",
    "greater_equal": "ge",
    "greater": "gt",
    "not_equal": "ne",
    "div": "truediv",
    "divide": "truediv",
    "true_divide": "truediv",
    "floor_divide": "floordiv",
    "remainder": "mod",
    "subtract": "sub",
    "multiply": "mul",
    "negative": "neg",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "concat": "cat",
    "concatenate": "cat",
    "scaled_dot_product_attention": "sdpa",
    "_softmax": "softmax",
    "clip": "clamp",
    "broadcast_to": "expand",
}
_REFLECTED = {
    "radd": "add",
    "rsub": "sub",
    "rmul": "mul",
    "rtruediv": "truediv",
    "rand": "and",
    "ror": "or",
    "rxor": "xor",
    "rfloordiv": "floordiv",
}


def spelling(node: fx.Node) -> str | None:
    """Canonical name of what ``node`` calls, None for anything that is not torch's or Python's own."""
    if node.op == "call_method":
        name = str(node.target)
        name = name.strip("_") if name.startswith("__") else name
        return _REFLECTED.get(name, _ALIASES.get(name, name))
    if node.op != "call_function":
        return None
    target = node.target
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        qualified = str(target._schema.name if isinstance(target, torch._ops.OpOverload) else target._qualified_op_name)
        name = qualified.removeprefix("aten::")
        return None if "::" in name else _ALIASES.get(name, name)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return str(target.name())
    name = getattr(target, "__name__", "")
    homes = (operator, torch, F, torch.Tensor, torch.special, torch._C._nn)
    if not any(getattr(home, name, None) is target for home in homes):
        return None
    if getattr(operator, name, None) is target:
        name = name.strip("_")
    return _ALIASES.get(name, name)


def read(node: Any) -> Op | None:
    """``node`` as a canonical operation, None when it is not in the vocabulary or its arguments do not bind."""
    if not isinstance(node, fx.Node) or (name := spelling(node)) not in SIGNATURES:
        return None
    assert name is not None
    raw, is_method = _raw_name(node)
    arguments = tuple(node.args)
    if is_method and raw.strip("_") in _REFLECTED:
        arguments = (node.args[1], node.args[0])
    elif is_method and (place := schemas.receiver_place(raw)):
        arguments = (*arguments[1 : place + 1], arguments[0], *arguments[place + 1 :])
    return bind(name, arguments, _own_words(name, raw, dict(node.kwargs)))


def _raw_name(node: fx.Node) -> tuple[str, bool]:
    """(name as it is called, whether as a method of its first argument)."""
    if node.op == "call_method":
        return str(node.target), True
    name = getattr(node.target, "__name__", "").partition(".")[0]
    # ``torch.Tensor.where`` as a function binds as the method does.
    is_method = node.target is getattr(torch.Tensor, name, None) and node.target is not getattr(torch, name, None)
    return name, is_method


def _own_words(name: str, raw: str, keywords: dict[str, Any]) -> dict[str, Any]:
    """Keywords by the vocabulary's names, where torch's schema calls the parameter at that place something else."""
    parameters = [p.name for p in SIGNATURES[name]]
    places = schemas.keyword_places(raw)
    renamed = {}
    for word, given in keywords.items():
        place = places.get(word)
        known = word in parameters or place is None or place >= len(parameters)
        renamed[word if known or place is None else parameters[place]] = given
    return renamed


def named(name: str, node: fx.Node) -> Op | None:
    """The arguments of ``node``, but for where its result goes, bound to the operation ``name``; None where the
    vocabulary has no such."""
    raw, name = name, _ALIASES.get(name, name)
    if name not in SIGNATURES:
        return None
    return bind(name, node.args, _own_words(name, raw, {k: v for k, v in node.kwargs.items() if k != "out"}))


LIKE = {
    "expand_as",
    "view_as",
    "reshape_as",
    "type_as",
    "ones_like",
    "zeros_like",
    "full_like",
    "empty_like",
    "new_ones",
    "new_zeros",
    "new_full",
    "new_empty",
    "size",
    "numel",
}
"""Operations that take shape, dtype or device from a tensor; those of two tensors from the second."""


def bind(name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Op | None:
    """Bind positional and keyword arguments to the vocabulary's parameter names."""
    values: dict[str, Any] = {}
    rest = list(arguments)
    for known in SIGNATURES[name]:
        parameter, default, variadic = known.name, known.default, known.variadic
        if variadic:
            taken = keywords.pop(parameter, keywords.pop("shape", rest))
            rest = [] if taken is rest else rest
            taken = taken if isinstance(taken, list | tuple) else (taken,)
            values[parameter] = (
                tuple(taken[0]) if len(taken) == 1 and isinstance(taken[0], list | tuple | torch.Size) else tuple(taken)
            )
        elif rest:
            values[parameter] = rest.pop(0)
        elif parameter in keywords:
            values[parameter] = keywords.pop(parameter)
        elif default is not REQUIRED:
            values[parameter] = default
        elif name == "arange":
            continue
        else:
            return None
    if name == "arange":
        # torch.arange(start=.., end=.., step=..): keywords become bounds.
        bounds = [*values["bounds"], *(keywords.pop(k) for k in ("start", "end", "step") if k in keywords)]
        values["bounds"] = tuple(bounds)
    if name == "to":
        values = _bind_to(values, rest)
        rest = []
    for harmless in (
        "non_blocking",
        "copy",
        "memory_format",
        "layout",
        "pin_memory",
        "requires_grad",
        "out_dtype",
        "_stacklevel",
        "inplace",
        "stable",
    ):
        if keywords.get(harmless) in (None, False) or harmless in (
            "non_blocking",
            "copy",
            "memory_format",
            "_stacklevel",
        ):
            keywords.pop(harmless, None)
    if name == "view" and any(isinstance(n, torch.dtype) for n in values["size"]):
        return None  # other bits, not another shape
    return None if rest or keywords else Op(name, values)


def _bind_to(values: dict[str, Any], rest: list[Any]) -> dict[str, Any]:
    """``x.to(...)`` takes dtype, device or another tensor in any of its first places."""
    bound = {"input": values["input"], "dtype": values["dtype"], "device": values["device"], "other": None}
    for argument in (values["target"], values["dtype"], values["device"], *rest):
        if isinstance(argument, torch.dtype):
            bound["dtype"] = argument
        elif isinstance(argument, fx.Node):
            bound["other"] = argument
    if not isinstance(bound["dtype"], torch.dtype):
        bound["dtype"] = None
    return bound
