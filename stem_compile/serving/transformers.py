"""``attn_implementation="stem"``: sparse prefill in transformers without compiling the model.

transformers looks attention functions and mask functions up by name (``AttentionInterface``,
``AttentionMaskInterface``). The mask function registered here returns a ``PrefillMask``: the description of a mask
instead of its q_len x kv_len entries. The attention function hands both to one small compiled function per kind of
attention, in which the mask is built and SDPA called exactly as transformers does it; ``backend="stem"`` rewrites that
graph as it would rewrite the model's. The selection is therefore the one that ``torch.compile(model, backend="stem")``
makes, and everything the backend knows about masks holds here too. Decoding, short prompts and what the backend
refuses go to SDPA.

Continuous batching (``generate_batch``) packs requests and keeps their keys in pages. transformers refuses it to
attentions that it does not know by name, so ``register_attention`` gives each name a second one for packed batches
(``PackedAttention``) and teaches continuous batching to take it, to build no mask for it and to tell it each prompt's
length. All that is known of transformers' internals stands in this file.
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
from stem_compile.serving import routing, sequence
from stem_compile.serving.routing import Part

MaskFunction = Callable[..., Any]

DENSE_ARGUMENTS = frozenset({"position_bias", "head_mask", "output_attentions", "block_table", "cache"})
"""Keyword arguments of an attention call that change its result and that the sparse path does not know."""


PACKED = "_packed"
"""Ends the name under which an attention serves continuous batching."""
PARTS = "stem_parts"
"""Keyword argument by which the packed attention is told what a batch is made of."""
DENSE_QUERIES = 256
"""Queries that dense attention of a packed sequence computes at once: its masks are no larger than these times its
keys."""


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
    AttentionInterface.register(name + PACKED, PackedAttention(config))
    AttentionMaskInterface.register(name + PACKED, lambda *args, **kwargs: None)
    _adapt_continuous_batching()


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


class PackedAttention:
    """transformers' attention function for continuous batching, under one ``StemConfig``.

    A layer with a sliding window is dense: its cache holds no more than the window.
    """

    def __init__(self, config: StemConfig) -> None:
        self.config = config

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """(output [1, tokens, heads, head dim], None). query: [1, heads, tokens, d]; key, value: [1, key heads, tokens,
        d] of the tokens that are new. Raises ValueError outside continuous batching."""
        parts: list[Part] | None = kwargs.get(PARTS)
        if cache is None or parts is None:
            raise ValueError("this attention serves generate_batch alone: give the name without '_packed' to a model")
        layer: int = module.layer_idx  # type: ignore[assignment]
        lengths = [cache.layer_to_allocator[layer].get_seqlen_k(part.begin, part.queries) for part in parts]
        key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=kwargs)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        out = q.new_zeros(*q.shape[:2], v.shape[-1])
        asked = not self.config.keeps_dense(layer) and (self.config.fuel is None or layer < self.config.fuel)
        sparse = asked and sliding_window is None
        scores: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
        first = 0
        for part, length in zip(parts, lengths, strict=True):
            own = slice(first, first + length)
            first += length
            rows = slice(part.start, part.start + part.queries)
            if sparse and length == part.keys:
                self._pieces(out, q, k[own], v[own], part, layer, scores)
            else:
                out[rows] = dense_sequence(q[rows], k[own], v[own], window=sliding_window, **scores)
        return out.unsqueeze(0), None

    def _pieces(
        self,
        out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        part: Part,
        layer: int,
        scores: dict[str, Any],
    ) -> None:
        for piece in routing.pieces(part, self.config):
            rows = slice(piece.start, piece.start + piece.queries)
            own_k, own_v = k[: piece.keys], v[: piece.keys]
            if piece.sparse:
                try:
                    attention = sequence.attention(
                        q[rows], own_k, own_v, self.config, prompt=part.total, layer=layer, **scores
                    )
                    out[rows] = sequence.attend(attention, sequence.select(attention))
                    continue
                except Exception as error:
                    if self.config.fallback == "error":
                        raise
                    _warn_once(f"a prefill stays dense: {type(error).__name__}: {error}")
            out[rows] = dense_sequence(q[rows], own_k, own_v, **scores)


def dense_sequence(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the last queries of one sequence, [queries, heads, dv]. q: [queries, heads, d]; k, v: [keys,
    key heads, d]. window: keys that a query sees, itself among them. Memory grows with the keys, not with their square.
    """
    offset, parts = k.shape[0] - q.shape[0], []
    for first in range(0, q.shape[0], DENSE_QUERIES):
        rows = q[first : first + DENSE_QUERIES]
        begin, end = offset + first, offset + first + rows.shape[0]
        low = 0 if window is None else max(0, begin - window + 1)
        mask = None
        if rows.shape[0] > 1:
            place = torch.arange(begin, end, device=q.device)[:, None]
            keys = torch.arange(low, end, device=q.device)
            mask = (keys <= place) if window is None else (keys <= place) & (keys > place - window)
        q4, k4, v4 = (x.transpose(0, 1).unsqueeze(0) for x in (rows, k[low:end], v[low:end]))
        parts.append(dense_attention(q4, k4, v4, mask, False, scale, softcap, sinks)[0].transpose(0, 1))
    return torch.cat(parts) if parts else q.new_empty(*q.shape[:2], v.shape[-1])


def _is_registered(model_config: Any, kind: type) -> bool:
    from transformers import AttentionInterface

    name = str(getattr(model_config, "_attn_implementation", None))
    return isinstance(AttentionInterface._global_mapping.get(name), kind)


@functools.cache
def _adapt_continuous_batching() -> None:
    """Let transformers' continuous batching take packed attentions; once a process. Where its inside is not as known,
    nothing is changed and one warning says that ``generate_batch`` refuses these names, as it does by itself."""
    try:
        from transformers.generation.continuous_batching import cache, continuous_api, input_outputs

        manager: Any = continuous_api.ContinuousBatchingManager
        memory: Any = cache.PagedAttentionMemoryHandler
        inputs: Any = input_outputs.ContinuousBatchingIOs
        paired: Any = input_outputs.ContinuousBatchingAsyncIOs
        switch, size = manager.switch_to_cb_friendly_attn, memory.__init__
        gather, gather_paired = inputs.get_model_kwargs, paired.get_model_kwargs
    except (ImportError, AttributeError) as error:
        _warn_once(f"generate_batch is not served with this version of transformers ({error})")
        return

    @functools.wraps(switch)
    def switched(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        name = model.config._attn_implementation
        if _is_registered(model.config, SparseAttention):
            model.set_attn_implementation(name + PACKED)
            self._original_attn_impl = name
        elif not _is_registered(model.config, PackedAttention):
            switch(self, model, *args, **kwargs)

    @functools.wraps(size)
    def sized(self: Any, *args: Any, **kwargs: Any) -> None:
        size(self, *args, **kwargs)
        if _is_registered(self.config, PackedAttention):
            self.num_attention_masks = 0

    def told(gather: Callable[..., Any], host: Callable[[Any], Any]) -> Callable[..., Any]:
        @functools.wraps(gather)
        def gathered(self: Any, *args: Any, **kwargs: Any) -> Any:
            arguments = gather(self, *args, **kwargs)
            if _is_registered(host(self).config, PackedAttention):
                arguments[PARTS] = _parts(host(self).requests_in_batch)
            return arguments

        return gathered

    manager.switch_to_cb_friendly_attn, memory.__init__ = switched, sized
    inputs.get_model_kwargs = told(gather, lambda batch: batch)
    paired.get_model_kwargs = told(gather_paired, lambda batch: batch.io_pairs[batch.current_pair].host_io)


def _parts(requests: Any) -> list[Part]:
    """What a batch is made of; ``position_offset`` already counts the batch's own tokens."""
    parts, start = list[Part](), 0
    for row, request in enumerate(requests):
        state, queries = request.state, request.query_length
        parts.append(Part(row, start, queries, state.position_offset, len(state.initial_tokens)))
        start += queries
    return parts


@functools.cache
def _warn_once(message: str) -> None:
    from stem_compile.reasons import StemWarning

    warnings.warn(f"attn_implementation 'stem': {message}", StemWarning, stacklevel=3)
