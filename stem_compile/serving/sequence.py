"""Sparse prefill of one sequence by the kernels of its device, without a graph around it."""

from __future__ import annotations

import functools
from dataclasses import replace

import sympy
import torch

from stem_compile.algebra import masks
from stem_compile.algebra.scores import Score
from stem_compile.algebra.symbolic import SCORE, H, tensor
from stem_compile.config import StemConfig
from stem_compile.kernels import launch
from stem_compile.selection import Attention, BlockSelection, Observed, announce


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: StemConfig,
    *,
    prompt: int,
    layer: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> Attention:
    """Causal attention of the last queries of a sequence.

    q: [queries, heads, d]; k, v: [keys, key heads, d], keys at least queries, of one dtype and device. prompt: tokens
    of the whole prompt, by which budgets are reckoned. layer: which attention of the model it is. scale: of the
    products, None is d ** -0.5. softcap: cap of the scaled products. sinks: [heads], a logit beside each row's. Raises
    ValueError for shapes, dtypes or devices that do not belong together.
    """
    _check(q, k, v, prompt, sinks)
    whole_q, whole_k, whole_v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return Attention(
        whole_q,
        whole_k,
        whole_v,
        mask_text=_causal(k.shape[0] - q.shape[0]),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        spec_text=_spec(config, layer, prompt),
        score_text=_score(softcap, sinks is not None),
        tensors=() if sinks is None else (sinks.float(),),
    )


def select(attention: Attention) -> BlockSelection:
    """Blocks to compute. Raises ValueError where the device has no kernels for the attention."""
    names, target = launch.kernels(attention), launch.target(attention.device.type)
    assert target is not None, "kernels() has named them"
    lists = attention.selection(*target.select(attention, names.select))
    return announce(Observed(lists, attention))


def attend(attention: Attention, lists: BlockSelection) -> torch.Tensor:
    """Attention over the listed blocks: [queries, heads, d]. Raises ValueError as ``select`` does."""
    names, target = launch.kernels(attention), launch.target(attention.device.type)
    assert target is not None, "kernels() has named them"
    return target.attend(attention, lists, names.attend)[0].transpose(0, 1)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, prompt: int, sinks: torch.Tensor | None) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.dim() == k.dim() == v.dim() == 3 and k.shape[:2] == v.shape[:2] and q.shape[2] == k.shape[2]):
        raise ValueError(f"{shapes}: [queries, heads, d] and twice [keys, key heads, d] are needed")
    if not 0 < q.shape[0] <= k.shape[0]:
        raise ValueError(f"{q.shape[0]} queries and {k.shape[0]} keys: queries are the last ones of the sequence")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    if len({x.dtype for x in (q, k, v)}) > 1 or len({x.device for x in (q, k, v)}) > 1:
        raise ValueError(f"q, k and v must share dtype and device, not {q.dtype}, {k.dtype}, {v.dtype}")
    if prompt < k.shape[0]:
        raise ValueError(f"a prompt of {prompt} tokens cannot have {k.shape[0]} keys: give the whole prompt's length")
    if sinks is not None and tuple(sinks.shape) != (q.shape[1],):
        raise ValueError(f"sinks of shape {tuple(sinks.shape)}: one logit a head, [{q.shape[1]}]")


@functools.lru_cache(maxsize=1024)
def _causal(offset: int) -> str:
    return masks.encode(masks.Causal(offset))


@functools.lru_cache(maxsize=1024)
def _spec(config: StemConfig, layer: int, prompt: int) -> str:
    return replace(config.selection_of(layer), prompt_length=prompt).text()


@functools.lru_cache(maxsize=64)
def _score(softcap: float | None, sink: bool) -> str:
    expr = SCORE if softcap is None else softcap * sympy.tanh(SCORE / softcap)
    return Score(expr, tensor(0)(H) if sink else None).text
