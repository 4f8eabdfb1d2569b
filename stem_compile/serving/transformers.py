"""``attn_implementation="stem"``: sparse prefill in transformers without compiling the model.

transformers looks attention functions and mask functions up by name (``AttentionInterface``,
``AttentionMaskInterface``). The mask function registered here returns a ``PrefillMask``: the description of a mask
instead of its q_len x kv_len entries. The attention function hands both to one small compiled function per kind of
attention, in which the mask is built and SDPA called exactly as transformers does it; ``backend="stem"`` rewrites that
graph as it would rewrite the model's. The selection is therefore the one that ``torch.compile(model, backend="stem")``
makes, and everything the backend knows about masks holds here too. Decoding, short prompts and what the backend
refuses go to SDPA.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from stem_compile.config import StemConfig

MaskFunction = Callable[..., Any]

DENSE_ARGUMENTS = frozenset({"position_bias", "head_mask", "output_attentions", "block_table", "cache"})
"""Keyword arguments of an attention call that change its result and that the sparse path does not know."""


def register_attention(name: str = "stem", *, options: dict[str, Any] | StemConfig | None = None) -> None:
    """Make ``attn_implementation=name`` mean sparse prefill, for every model that asks transformers for its attention.

    options: those of ``torch.compile(model, backend="stem", options=...)``; ``inner``, ``mode`` and ``fallback`` mean
    nothing here. Registering a name again replaces it. Raises OptionError for a wrong option, ValueError for the name
    of an implementation that transformers has itself, ImportError without transformers.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    config = StemConfig.from_options(options)
    registered = AttentionInterface._global_mapping.get(name)
    if name in ("eager", "sdpa") or (registered is not None and not isinstance(registered, SparseAttention)):
        raise ValueError(f"name={name!r} is an attention of transformers itself: choose another, such as 'stem'")
    AttentionInterface.register(name, SparseAttention(config))
    AttentionMaskInterface.register(name, functools.partial(prefill_mask, config))


class PrefillMask:
    """A mask of shape [batch, 1, q_len, kv_len] that says what it means and holds O(batch x kv_len) memory.

    function: transformers' ``mask_function(batch, head, q, kv)``. padding: [batch, keys] or None. Any other use than by
    ``SparseAttention`` (a model that slices its mask, say) makes the dense Boolean tensor, with one warning.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments
        self._dense: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """[batch, 1, q_len, kv_len], as that of the tensor that it stands for."""
        a = self.arguments
        return torch.Size((a["batch_size"], 1, int(a["q_length"]), int(a["kv_length"])))

    def dense(self) -> torch.Tensor:
        """Boolean [batch, 1, q_len, kv_len]; True is visible."""
        from transformers.masking_utils import sdpa_mask

        dense = self._dense
        if dense is None:
            dense = self._dense = sdpa_mask(**self.arguments, allow_is_causal_skip=False)
        assert dense is not None, "a mask that may not be skipped is always made"
        return dense

    def _materialised(self) -> torch.Tensor:
        _warn_once(
            "this model computes with its attention mask, so the q_len x kv_len mask is built; attention itself stays "
            "sparse where the mask it makes is read"
        )
        return self.dense()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._materialised(), name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._materialised()[index]

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        dense = [a._materialised() if isinstance(a, PrefillMask) else a for a in args]
        named = {k: a._materialised() if isinstance(a, PrefillMask) else a for k, a in (kwargs or {}).items()}
        return function(*dense, **named)


def prefill_mask(
    stem_config: StemConfig,
    /,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction | None = None,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> PrefillMask | torch.Tensor | None:
    """transformers' mask function: None for a plain causal mask, a ``PrefillMask`` for a prefill that may be sparse,
    and what SDPA takes for everything else (decoding, short prompts, while a compiler traces the model)."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    arguments: dict[str, Any] = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function or causal_mask_function,
        "attention_mask": attention_mask,
    }
    if torch.compiler.is_compiling() or not _may_be_sparse(stem_config, q_length, kv_length):
        return sdpa_mask(**arguments, **kwargs)
    arguments |= {name: kwargs[name] for name in ("use_vmap", "device", "local_size") if name in kwargs}
    return PrefillMask(arguments)


def _may_be_sparse(config: StemConfig, q_length: int, kv_length: int) -> bool:
    return q_length > 1 and kv_length >= max(config.shortest, 2)


@dataclass(frozen=True)
class _Kind:
    """What makes two attentions different programs: where one compiled function serves, the kinds are equal."""

    masked: bool
    described: bool
    capped: bool
    sink: bool
    layer: str


class SparseAttention:
    """transformers' attention function under one ``StemConfig``."""

    def __init__(self, config: StemConfig) -> None:
        # The graph is one attention: what is left of it needs no compiler, and the model's layers are counted here.
        self.config = config
        self._inner = replace(config, inner="eager", mode=None, fallback="dense", dense_layers=0, fuel=None)
        self._compiled: dict[_Kind, Callable[..., torch.Tensor]] = {}

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: PrefillMask | torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """(output [batch, q_len, heads, head dim], None). query: [batch, heads, q_len, d]; key, value: [batch, key
        heads, kv_len, d]."""
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and query.shape[2] > 1
        causal = causal and attention_mask is None
        unknown = sorted(name for name in DENSE_ARGUMENTS & kwargs.keys() if kwargs[name] is not None)
        if unknown or dropout:
            _warn_once(f"attention with {', '.join(unknown) or 'dropout'} is computed densely")
        sparse = self._applies(module, query, key) and not unknown and not dropout and not torch.compiler.is_compiling()
        if not sparse:
            mask = attention_mask.dense() if isinstance(attention_mask, PrefillMask) else attention_mask
            if unknown:
                return self._sdpa(module, query, key, value, mask, dropout, scaling, is_causal, kwargs)
            out = dense_attention(query, key, value, mask, causal, scaling, softcap, s_aux, dropout)
            return out.transpose(1, 2).contiguous(), None
        described = isinstance(attention_mask, PrefillMask)
        kind = _Kind(attention_mask is not None, described, softcap is not None, s_aux is not None, _layer(module))
        if kind not in self._compiled:
            self._compiled[kind] = _compiled(self._inner)
        program = attention_mask.arguments if isinstance(attention_mask, PrefillMask) else attention_mask
        out = self._compiled[kind](query, key, value, program, causal, scaling, softcap, s_aux)
        return out.transpose(1, 2).contiguous(), None

    def _applies(self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor) -> bool:
        layer = getattr(module, "layer_idx", None)
        if layer is not None and (
            self.config.keeps_dense(layer) or (self.config.fuel is not None and layer >= self.config.fuel)
        ):
            return False
        return _may_be_sparse(self.config, query.shape[2], key.shape[2])

    @staticmethod
    def _sdpa(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        dropout: float,
        scaling: float | None,
        is_causal: bool | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, None]:
        from transformers import AttentionInterface

        sdpa = AttentionInterface._global_mapping["sdpa"]
        result: tuple[torch.Tensor, None] = sdpa(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        return result


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    scaling: float | None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention as transformers' models compute it, [batch, heads, q_len, value dim]: SDPA, or written out where a
    softcap or a sink (one logit a head, [heads]) asks for it."""
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=causal,
            scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.matmul(query, key.transpose(2, 3)) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if causal:
        rows = torch.arange(scores.shape[2], device=scores.device)[:, None]
        mask = torch.arange(scores.shape[3], device=scores.device)[None] <= rows
    if mask is not None:
        least = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, least) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.softmax(torch.cat([scores, column], -1).float(), -1)[..., :-1].to(query.dtype)
    else:
        weights = torch.softmax(scores.float(), -1).to(query.dtype)
    return torch.matmul(F.dropout(weights, dropout), value)


def _compiled(config: StemConfig) -> Callable[..., torch.Tensor]:
    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: dict[str, Any] | torch.Tensor | None,
        causal: bool,
        scaling: float | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        from transformers.masking_utils import sdpa_mask

        if isinstance(mask, dict):
            mask = sdpa_mask(**mask, allow_is_causal_skip=False)
        return dense_attention(query, key, value, mask, causal, scaling, softcap, sinks)

    limits: dict[str, Any] = {"recompile_limit": 64, "isolate_recompiles": True}
    known = inspect.signature(torch.compile).parameters
    compile_function: Any = torch.compile
    compiled: Callable[..., torch.Tensor] = compile_function(
        attention, backend="stem", options=config, **{k: v for k, v in limits.items() if k in known}
    )
    return compiled


def _layer(module: torch.nn.Module) -> str:
    """Kind of a model's layer: windows and full attention alternate, and each has a program of its own."""
    return f"{type(module).__name__} {getattr(module, 'layer_type', None)} {getattr(module, 'sliding_window', None)}"


@functools.cache
def _warn_once(message: str) -> None:
    from stem_compile.reasons import StemWarning

    warnings.warn(f"attn_implementation 'stem': {message}", StemWarning, stacklevel=3)
