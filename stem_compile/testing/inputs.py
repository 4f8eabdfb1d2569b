"""Where a model's inputs come from: its transformers config, its signature, an example batch, a function or a strategy
of the user's."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from stem_compile.testing.case import Case, Inputs

CACHES = ("past_key_values", "cache")
"""Names of the argument that takes a cache of keys and values; the second is that of transformers 5.24."""


@dataclass(frozen=True)
class Source:
    """make: Case -> Inputs. can: what cases may ask for ("batch", "length", "padding", "embeds", "positions", "cache").

    longest: tokens the model has positions for. frugal: draw one batch size where any would do, as each is a trace, and
    few seeds, so that runs are shared. cache: name of the argument that takes a cache of keys and values.
    strategy: set when the user draws the inputs; then cases carry them in ``given``.
    """

    make: Callable[[Case], Inputs]
    can: frozenset[str]
    longest: int = 1 << 20
    strategy: Any = None
    words: str = ""
    frugal: bool = False
    cache: str = ""


class NoInputs(TypeError):
    """Inputs cannot be derived; the message says what to pass."""


def source_of(model: torch.nn.Module, given: Any = None) -> Source:
    """given: None, a function (batch, length, seed) -> inputs, a Hypothesis strategy of inputs, or an example batch.
    Inputs are a tensor, a tuple of arguments, a dict of keyword arguments, or the pair of both. Raises NoInputs."""
    if given is None:
        return _of_transformers(model) if _is_transformers(model) else _of_signature(model)
    if hasattr(given, "example") and hasattr(given, "map"):
        return Source(lambda case: _inputs(case.given), frozenset(), strategy=given, words="drawn by a strategy")
    if callable(given):
        return _of_function(given)
    return _padded(_of_example(_inputs(given)), Case())


def _of_function(given: Callable[[int, int, int], Any]) -> Source:
    source = Source(
        lambda case: _inputs(given(case.batch, case.length, case.seed)),
        frozenset({"batch", "length"}),
        words="made by make_inputs",
    )
    return _padded(source, Case(batch=2))


def _padded(source: Source, probe: Case) -> Source:
    """The same, with padding in the inputs' own ``attention_mask`` where they have one of shape [batch, length]. A mask
    that already hides tokens is the user's and stays."""

    def mask_of(inputs: Inputs, case: Case) -> torch.Tensor | None:
        mask = inputs.kwargs.get("attention_mask")
        if not isinstance(mask, torch.Tensor) or mask.shape != (case.batch, case.length) or mask.is_floating_point():
            return None
        return mask

    try:
        mask = mask_of(source.make(probe), probe)
    except Exception:
        # A function that does not take this length tells nothing; its own lengths will fail in their own words.
        return source
    if mask is None:
        return source

    def make(case: Case) -> Inputs:
        inputs = source.make(case)
        mask = mask_of(inputs, case)
        if mask is None:
            return inputs
        if case.pad and bool(mask.all()):
            mask = mask.clone()
            mask[-1, slice(0, case.pad) if case.side == "left" else slice(case.length - case.pad, None)] = 0
        valid = None if bool(mask.all()) else mask.bool()
        return Inputs(inputs.args, inputs.kwargs | {"attention_mask": mask}, valid)

    can = source.can | ({"padding"} if bool(mask.all()) else set())
    return dataclasses.replace(source, make=make, can=can)


def _inputs(value: Any) -> Inputs:
    if isinstance(value, Inputs):
        return value
    if isinstance(value, Mapping):
        return Inputs((), dict(value))
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], tuple) and isinstance(value[1], Mapping):
        return Inputs(value[0], dict(value[1]))
    return Inputs(tuple(value) if isinstance(value, tuple | list) else (value,), {})


def place_of(model: torch.nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a model's first floating parameter; the CPU and fp32 without one."""
    for parameter in (*model.parameters(), *model.buffers()):
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return torch.device("cpu"), torch.float32


def _generator(case: Case) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * case.seed + case.length)


def _is_transformers(model: torch.nn.Module) -> bool:
    return any(c.__module__.startswith("transformers.") for c in type(model).__mro__) and hasattr(model, "config")


def _of_transformers(model: Any) -> Source:
    device, dtype = place_of(model)
    config = model.config.get_text_config()
    parameters = inspect.signature(model.forward).parameters
    vocabulary = int(config.vocab_size)
    embedding = model.get_input_embeddings()
    special = {getattr(config, name, None) for name in ("pad_token_id", "eos_token_id", "bos_token_id")} - {None}
    floor = 1 + max((s for s in special if isinstance(s, int) and s < min(8, vocabulary // 2)), default=0)
    can = {"batch", "length"} | ({"padding"} if "attention_mask" in parameters else set())
    can |= {"positions"} if "position_ids" in parameters else set()
    can |= {"embeds"} if "inputs_embeds" in parameters else set()
    cache = next((name for name in CACHES if name in parameters), "")
    can |= {"cache"} if cache and "use_cache" in parameters else set()

    def make(case: Case) -> Inputs:
        ids = torch.randint(floor, vocabulary, (case.batch, case.length), generator=_generator(case)).to(device)
        mask = torch.ones(case.batch, case.length, dtype=torch.long, device=device)
        if case.pad:
            mask[-1, slice(0, case.pad) if case.side == "left" else slice(case.length - case.pad, None)] = 0
        kwargs: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
        if case.style == "embeds":
            kwargs["inputs_embeds"] = embedding(ids).detach().to(dtype)
        else:
            kwargs["input_ids"] = ids
        if case.pad:
            kwargs["attention_mask"] = mask
        if (case.pad or case.positions) and "position_ids" in parameters:
            kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return Inputs((), kwargs, mask.bool() if case.pad else None)

    longest = next(
        (
            int(n)
            for n in (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
            if n
        ),
        1 << 20,
    )
    return Source(make, frozenset(can), longest, words="token ids from the transformers config", cache=cache)


def _of_signature(model: torch.nn.Module) -> Source:
    device, dtype = place_of(model)
    required = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    first = next(
        (
            m
            for m in model.modules()
            if isinstance(m, torch.nn.Embedding | torch.nn.Linear | torch.nn.LayerNorm | torch.nn.MultiheadAttention)
        ),
        None,
    )
    if len(required) != 1 or first is None:
        raise NoInputs(
            f"cannot tell what {type(model).__name__}.forward({', '.join(required)}) takes: pass make_inputs, "
            "a function (batch, length, seed) -> inputs, or an example batch"
        )

    def make(case: Case) -> Inputs:
        if isinstance(first, torch.nn.Embedding):
            return Inputs(
                (
                    torch.randint(0, first.num_embeddings, (case.batch, case.length), generator=_generator(case)).to(
                        device
                    ),
                ),
                {},
            )
        width = _width(first)
        return Inputs((torch.randn(case.batch, case.length, width, generator=_generator(case)).to(device, dtype),), {})

    return Source(make, frozenset({"batch", "length"}), words=f"derived from forward({required[0]})")


def _width(first: torch.nn.Module) -> int:
    if isinstance(first, torch.nn.MultiheadAttention):
        return int(first.embed_dim)
    return int(first.normalized_shape[-1]) if isinstance(first, torch.nn.LayerNorm) else int(first.in_features)  # type: ignore[arg-type]


def _of_example(example: Inputs) -> Source:
    """Other lengths and batch sizes of an example: its first tensor's leading two dimensions, wherever another tensor
    has those sizes."""
    tensors = [
        x
        for x in torch.utils._pytree.tree_leaves((example.args, example.kwargs))
        if isinstance(x, torch.Tensor) and x.dim() > 1
    ]
    if not tensors:
        raise NoInputs("an example batch needs a tensor of shape [batch, length, ...]")
    batch, length = tensors[0].shape[:2]

    def resized(x: Any, case: Case, generator: torch.Generator) -> Any:
        if not isinstance(x, torch.Tensor) or not x.dim():
            return x
        shape = [
            case.batch if n == 0 and s == batch else case.length if s == length else s for n, s in enumerate(x.shape)
        ]
        if x.is_floating_point():
            return torch.randn(shape, generator=generator).to(x.device, x.dtype)
        if x.dtype == torch.bool or bool((x == x.flatten()[0]).all()):
            return x.flatten()[0].expand(shape).clone()
        low, high = int(x.min()), int(x.max()) + 1
        if x.dim() == 2 and bool((x == torch.arange(length, device=x.device)).all()):
            return torch.arange(case.length, device=x.device).expand(shape).clone()
        return torch.randint(low, high, shape, generator=generator).to(x.device, x.dtype)

    def make(case: Case) -> Inputs:
        change = functools.partial(resized, case=case, generator=_generator(case))
        args, kwargs = tree_map(change, (example.args, example.kwargs))
        return Inputs(args, kwargs)

    return Source(make, frozenset({"batch", "length"}), words="like the example batch")
