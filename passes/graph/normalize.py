"""See Dynamo's graph through one vocabulary: function, method and operator spellings of an op are one op, arguments
bound by name.

Nothing is rewritten: ``read(node)`` is a view. Matching here, before decomposition, is what keeps patterns short:
scaled_dot_product_attention is one node, and a mask is still written in the words of the model's author. (A retrace
with make_fx gives cleaner ATen, but fails on real
models under dynamic shapes: aten._local_scalar_dense.)
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx


@dataclass(frozen=True)
class Op:
    """One canonical operation. args: parameter name -> node or constant, defaults filled in."""

    name: str
    args: dict[str, Any]

    def __getitem__(self, parameter: str) -> Any:
        return self.args[parameter]


# name: parameters, "=default" where there is one, "*" collects a shape or dims given loose or as one sequence.
_SIGNATURES = """
add: input other alpha=1 | sub: input other alpha=1 | mul: input other | truediv: input other rounding_mode=None
floordiv: input other | mod: input other | neg: input | pow: input exponent | abs: input
le: input other | lt: input other | ge: input other | gt: input other | eq: input other | ne: input other
and: input other | or: input other | xor: input other | not: input
minimum: input other | maximum: input other | clamp: input min=None max=None
getitem: input index | arange: *bounds dtype=None device=None
ones: *size dtype=None device=None | zeros: *size dtype=None device=None
full: size fill_value dtype=None device=None
empty: *size dtype=None device=None | empty_like: input dtype=None | new_empty: input *size dtype=None device=None
fill: input value | zero: input
new_ones: input *size dtype=None device=None | new_zeros: input *size dtype=None device=None
new_full: input size fill_value dtype=None
ones_like: input dtype=None | zeros_like: input dtype=None | full_like: input fill_value dtype=None
tensor: data dtype=None device=None | scalar_tensor: data dtype=None device=None
unsqueeze: input dim | squeeze: input *dim | transpose: input dim0 dim1 | permute: input *dims | t: input
view: input *size | reshape: input *size | expand: input *size | expand_as: input other
flatten: input start_dim=0 end_dim=-1
repeat: input *size | repeat_interleave: input repeats dim=None | unflatten: input dim sizes
contiguous: input | clone: input | detach: input | alias: input
to: input target=None dtype=None device=None | bool: input | long: input | int: input | float: input | half: input
double: input
type: input dtype=None | type_as: input other
where: condition input other | masked_fill: input mask value | tril: input diagonal=0 | triu: input diagonal=0
cumsum: input dim dtype=None | diff: input n=1 dim=-1 prepend=None append=None | cat: tensors dim=0
stack: tensors dim=0
all: input dim=None keepdim=False | any: input dim=None keepdim=False | sum: input dim=None keepdim=False
size: input dim=None | numel: input
sigmoid: input | logsumexp: input dim keepdim=False
tanh: input | exp: input | log: input | sqrt: input | rsqrt: input | flip: input *dims | select: input dim index
narrow: input dim start length
max: input dim=None keepdim=False | amax: input dim=None keepdim=False
nan_to_num: input nan=None posinf=None neginf=None | bfloat16: input
matmul: input other | bmm: input other | baddbmm: input batch1 batch2 beta=1 alpha=1 | einsum: equation *operands
softmax: input dim=None dtype=None | dropout: input p=0.5 training=True inplace=False | view_as: input other
reshape_as: input other
flex_attention: query key value score_mod block_mask scale kernel_options=None
  score_mod_other_buffers=() mask_mod_other_buffers=()
sdpa: query key value attn_mask=None dropout_p=0.0 is_causal=False scale=None enable_gqa=False
"""

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


@functools.cache
def _signatures() -> dict[str, list[tuple[str, Any, bool]]]:
    table = {}
    for entry in _SIGNATURES.replace("\n  ", " ").replace("\n", "|").split("|"):
        if not entry.strip():
            continue
        name, _, parameters = entry.partition(":")
        parsed = []
        for p in parameters.split():
            word, has_default, default = p.lstrip("*").partition("=")
            parsed.append(
                (word, eval(default, {}) if has_default else inspect_empty, p.startswith("*"))
            )  # constants of the table above
        table[name.strip()] = parsed
    return table


inspect_empty = object()
"""Marks a parameter without a default."""


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
    if not isinstance(node, fx.Node) or (name := spelling(node)) not in _signatures():
        return None
    assert name is not None
    if node.op == "call_method" and str(node.target).strip("_") in _REFLECTED:
        arguments: tuple[Any, ...] = (node.args[1], node.args[0])
    else:
        arguments = node.args
    return bind(name, arguments, dict(node.kwargs))


def named(name: str, node: fx.Node) -> Op | None:
    """The arguments of ``node`` bound to the operation ``name``, None where the vocabulary has no such."""
    name = _ALIASES.get(name, name)
    return bind(name, node.args, dict(node.kwargs)) if name in _signatures() else None


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
    for parameter, default, variadic in _signatures()[name]:
        if variadic:
            taken = keywords.pop(parameter, keywords.pop("shape", rest))
            rest = [] if taken is rest else rest
            values[parameter] = (
                tuple(taken[0]) if len(taken) == 1 and isinstance(taken[0], list | tuple | torch.Size) else tuple(taken)
            )
        elif rest:
            values[parameter] = rest.pop(0)
        elif parameter in keywords:
            values[parameter] = keywords.pop(parameter)
        elif default is not inspect_empty:
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
