"""Write the fused operations of ``torch.nn`` out in their parts, so that the attention inside is one that patterns
know.

``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` reach the graph as one node each. Only those with a mask or
``is_causal`` are touched: without either, nothing could be rewritten, and the fused node is the faster one.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from stem_compile.passes.graph import memory, normalize
from stem_compile.passes.graph.values import value

_ENCODER_LAYER = [
    "src",
    "embed_dim",
    "num_heads",
    "qkv_weight",
    "qkv_bias",
    "proj_weight",
    "proj_bias",
    "use_gelu",
    "norm_first",
    "eps",
    "norm_weight_1",
    "norm_bias_1",
    "norm_weight_2",
    "norm_bias_2",
    "ffn_weight_1",
    "ffn_bias_1",
    "ffn_weight_2",
    "ffn_bias_2",
    "mask",
    "mask_type",
]


def expand(graph: fx.Graph) -> dict[fx.Node, Exception]:
    """Expand in place. Fused nodes that could not be written out stay, with what was raised."""
    _rename_overwritten(graph)
    broken: dict[fx.Node, Exception] = {}
    for node in list(graph.nodes):
        last = node.prev
        try:
            written = _written_out(node)
            if written is not None:
                _splice(graph, node, *written)
        except Exception as error:
            while node.prev is not last:
                graph.erase_node(node.prev)
            broken[node] = error
    return broken


def _rename_overwritten(graph: fx.Graph) -> None:
    """Make nodes that read a value after an in-place write read the write's result: it is the same tensor, and the
    graph then shows that they depend on the write."""
    for writer in reversed(graph.nodes):
        target = overwritten(writer)
        if target is not None:
            _restore_shape(writer, target)
    for writer in graph.nodes:
        target = overwritten(writer)
        if target is None:
            continue
        for user in [u for u in target.users if u > writer]:
            user.replace_input_with(target, writer)


_RESHAPED_BACK: dict[str, Callable[..., Any]] = {
    "unsqueeze_": lambda x, dim: x.squeeze(dim),
    **dict.fromkeys(("transpose_", "swapaxes_", "swapdims_"), lambda x, a, b: x.transpose(a, b)),
    "t_": lambda x: x.t(),
}
"""In-place views, which write no element: method -> the shape before, from the shape after."""


def _restore_shape(writer: fx.Node, target: fx.Node) -> None:
    """Make an in-place view a plain one. Dynamo records one example value for both, which has the final shape."""
    back = _RESHAPED_BACK.get(str(writer.target))
    if back is None or writer.kwargs or memory.memory(target) != memory.memory(writer):
        return
    with value(writer).fake_mode if hasattr(value(writer), "fake_mode") else contextlib.nullcontext():
        target.meta["example_value"] = back(value(writer), *fx.node.map_arg(writer.args[1:], value))
    writer.target = str(writer.target).removesuffix("_")


def overwritten(node: fx.Node) -> fx.Node | None:
    """The fresh tensor that an in-place method, or a function by its ``out=``, overwrites and returns; None for other
    nodes."""
    if not isinstance(value(node), torch.Tensor) or not memory.mutates(node):
        return None
    target = node.args[0] if node.op == "call_method" else node.kwargs.get("out")
    return target if isinstance(target, fx.Node) and memory.is_fresh(target) else None


def bound(node: fx.Node) -> dict[str, Any] | None:
    """Arguments by name of a fused attention of ``torch.nn``; None for any other node."""
    name = normalize.spelling(node) if node.op == "call_function" else None
    if name == "multi_head_attention_forward":
        call = inspect.signature(F.multi_head_attention_forward).bind(*node.args, **node.kwargs)
        call.apply_defaults()
        return dict(call.arguments)
    if name == "_transformer_encoder_layer_fwd":
        return dict.fromkeys(_ENCODER_LAYER) | dict(zip(_ENCODER_LAYER, node.args)) | dict(node.kwargs)
    return None


def _written_out(node: fx.Node) -> tuple[Callable[..., Any], list[fx.Node]] | None:
    a = bound(node)
    if a is None:
        return None
    return _multihead(node, a) if "embed_dim_to_check" in a else _layer(a)


def _multihead(node: fx.Node, a: dict[str, Any]) -> tuple[Callable[..., Any], list[fx.Node]] | None:
    weights_used = any(normalize.spelling(u) != "getitem" or u.args[1] != 0 for u in node.users)
    odd = (
        a["bias_k"] is not None
        or a["bias_v"] is not None
        or a["add_zero_attn"]
        or a["static_k"] is not None
        or a["static_v"] is not None
    )
    separate = (
        a["use_separate_proj_weight"]
        or value(a["query"]).dim() != 3
        or a["query"] is not a["key"]
        or a["key"] is not a["value"]
    )
    causal = bool(a["is_causal"]) and a["key_padding_mask"] is None
    if (
        weights_used
        or odd
        or separate
        or not (causal or a["attn_mask"] is not None)
        or (a["training"] and a["dropout_p"])
    ):
        return None
    heads, has_bias = int(value(a["num_heads"])), a["in_proj_bias"] is not None
    tensors = [a["query"], a["in_proj_weight"], a["out_proj_weight"], *_given(a["in_proj_bias"], a["out_proj_bias"])]
    masks = [] if causal else [m for m in (a["attn_mask"], a["key_padding_mask"]) if m is not None]
    padded = not causal and a["key_padding_mask"] is not None

    def forward(x: Any, qkv_weight: Any, proj_weight: Any, *rest: Any) -> Any:
        qkv_bias, proj_bias = (rest[0], rest[1]) if has_bias else (None, None)
        given = list(rest[2 if has_bias else 0 :])
        padding = given.pop() if padded else None
        out = _attention(
            x.transpose(0, 1),
            qkv_weight,
            qkv_bias,
            heads,
            given[0] if given else None,
            padding,
            causal,
            value(a["attn_mask"]),
            value(a["key_padding_mask"]) if padded else None,
        )
        return (F.linear(out.transpose(0, 1), proj_weight, proj_bias), None)

    return forward, [*tensors, *masks]


def _layer(a: dict[str, Any]) -> tuple[Callable[..., Any], list[fx.Node]] | None:
    # Type 1 is padding alone; 0 and 2 are [L, L] and [B, H, L, L].
    if a["mask"] is None or a["mask_type"] not in (0, 2):
        return None
    names = [n for n in _ENCODER_LAYER if isinstance(a[n], fx.Node)]

    def forward(*given: Any) -> Any:
        t = a | dict(zip(names, given))

        def attend(x: Any) -> Any:
            # The fused layer turns any mask into a Boolean one: what is not 0 hides.
            mask = t["mask"].to(torch.bool)
            out = _attention(
                x,
                t["qkv_weight"],
                t["qkv_bias"],
                int(value(a["num_heads"])),
                mask,
                None,
                False,
                torch.empty(0, 0, dtype=torch.bool),
            )
            return F.linear(out, t["proj_weight"], t["proj_bias"])

        def feed(x: Any) -> Any:
            hidden = F.linear(x, t["ffn_weight_1"], t["ffn_bias_1"])
            return F.linear(F.gelu(hidden) if a["use_gelu"] else F.relu(hidden), t["ffn_weight_2"], t["ffn_bias_2"])

        def norm(x: Any, which: int) -> Any:
            return F.layer_norm(
                x, (int(value(a["embed_dim"])),), t[f"norm_weight_{which}"], t[f"norm_bias_{which}"], t["eps"]
            )

        x = t["src"]
        if a["norm_first"]:
            x = x + attend(norm(x, 1))
            return x + feed(norm(x, 2))
        x = norm(x + attend(x), 1)
        return norm(x + feed(x), 2)

    return forward, [a[n] for n in names]


def _given(*tensors: Any) -> list[Any]:
    return [t for t in tensors if t is not None]


def _attention(
    x: Any,
    weight: Any,
    bias: Any,
    heads: int,
    mask: Any,
    padding: Any,
    causal: bool,
    mask_example: Any,
    padding_example: Any = None,
) -> Any:
    """Self-attention of x [batch, length, width] before its output projection. mask: True or -inf hides, as torch.nn
    means it; padding [batch, length] likewise. The examples tell their dtypes and shapes."""
    parts = F.linear(x, weight, bias).chunk(3, dim=-1)
    q, k, v = (parts[i].unflatten(-1, (heads, -1)).transpose(1, 2) for i in range(3))
    if mask is not None:
        if mask_example.dtype == torch.bool:
            mask = torch.logical_not(mask)
        if mask_example.dim() == 3:
            mask = mask.unflatten(0, (-1, heads))
    if padding is not None:
        mask = _joined(mask, mask_example.dtype, padding[:, None, None, :], padding_example.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out.transpose(1, 2).flatten(2)


def _joined(mask: Any, mask_dtype: torch.dtype, padding: Any, padding_dtype: torch.dtype) -> Any:
    """A mask in SDPA's sense (True is visible, floats are added) and a padding mask in torch.nn's (True hides)."""
    if padding_dtype == torch.bool:
        keys = torch.logical_not(padding)
        return mask & keys if mask_dtype == torch.bool else mask.masked_fill(padding, float("-inf"))
    return torch.where(mask, padding, float("-inf")) if mask_dtype == torch.bool else mask + padding


def _traced(function: Callable[..., Any], inputs: int) -> fx.Graph:
    """Graph of a function of tensors. Not by ``symbolic_trace``, which replaces ``nn.Module.__call__`` for the whole
    process meanwhile and so breaks models that run in other threads."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    result = function(*(fx.Proxy(graph.placeholder(f"x{i}"), tracer) for i in range(inputs)))
    graph.output(fx.node.map_aggregate(result, lambda x: x.node if isinstance(x, fx.Proxy) else x))
    return graph


def _splice(graph: fx.Graph, node: fx.Node, function: Callable[..., Any], inputs: list[fx.Node]) -> None:
    """Replace ``node`` by the operations of ``function`` of ``inputs``, with example values."""
    traced = _traced(function, len(inputs))
    copies: dict[fx.Node, Any] = dict(zip((n for n in traced.nodes if n.op == "placeholder"), inputs))
    mode = value(inputs[0]).fake_mode
    results = value(node)
    needs_grad = any(
        isinstance(t, torch.Tensor) and t.requires_grad
        for t in (results if isinstance(results, tuple | list) else (results,))
    )
    with graph.inserting_before(node):
        for inner in traced.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                result = fx.node.map_arg(inner.args[0], lambda n: copies[n])
                break
            copy = graph.node_copy(inner, lambda n: copies[n])
            copy.meta = {
                k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace", "source_fn_stack")
            }
            arguments, keywords = fx.node.map_arg(copy.args, value), fx.node.map_arg(copy.kwargs, value)
            with mode, torch.set_grad_enabled(needs_grad):
                if copy.op == "call_method":
                    example = getattr(arguments[0], str(copy.target))(*arguments[1:], **keywords)
                else:
                    example = copy.target(*arguments, **keywords)  # type: ignore[operator]
                copy.meta["example_value"] = example
            copies[inner] = copy
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(result[user.args[1]])
            graph.erase_node(user)
    graph.erase_node(node)
