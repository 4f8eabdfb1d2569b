"""StemConfig: every option of the backend, validated where it enters. The only reader of options and of the project's
own environment variables."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stem_compile.distributed.split import ORDERS, SplitError, TokenSplit
from stem_compile.registry import RegistryError
from stem_compile.selection import OptionValue, SelectionSpec, policies
from stem_compile.selection.policy import Option

INNER = ("inductor", "aot_eager", "eager")
MODES = ("default", "lite", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
FALLBACK = ("dense", "error")
WHEN_DENSE = ("warn", "silent", "error")
METRICS = ("paper", "released")
POOLINGS = ("mean", "max", "mass")
SHARES = ("none", "heads", "group")
STRIDES = (4, 8, 16, 32)
SCORE_DTYPES = ("native", "fp8")
QUERY_BLOCKS = (64, 128)
KEY_BLOCKS = (32, 64, 128)


def cache_folder() -> Path:
    """Where generated kernels and measured choices live: $STEM_COMPILE_CACHE, else ~/.cache/stem_compile."""
    return Path(os.environ.get("STEM_COMPILE_CACHE") or Path.home() / ".cache" / "stem_compile")


def serving_options() -> dict[str, Any] | None:
    """Options of serving plugins from $STEM_COMPILE_SERVING, such as "budget=0.25; min_length=4096"; None where it
    is not set, {} (the published schedule) for "1". Raises OptionError for wrong ones."""
    text = os.environ.get("STEM_COMPILE_SERVING", "").strip()
    if text in ("", "0"):
        return None
    return written_options(part.strip() for part in text.split(";") if part.strip() and text != "1")


class OptionError(ValueError):
    """An option that does not exist or cannot have the value given."""


@dataclass(frozen=True)
class StemConfig:
    """Options of ``torch.compile(model, backend="stem", options={...})``. Frozen and hashable; wrong values raise
    ``OptionError``.

    policy: how blocks are chosen: "stem" (TPD budgets, output-aware scores), "output_aware" (the same scores, one
    budget for all rows, without a causal order too) or "dense" (all of them, through the same kernels).
    budget: part of the causal block pairs to compute, in (0, 1]; None is the published length schedule. A sequence
    holds one for each attention of the model in turn, the last also for those that follow.
    coverage: in place of a budget: blocks are computed until they hold this share of a row's estimated mass (times
    the values' norms), at most the part ``cap`` of the causal block pairs; density then follows the text.
    mu: budget of the last row relative to the first (Eq. 3). beta: weight of the values' norms in block scores (Eq. 7).
    metric: "paper" is Eq. 7; "released" z-scores the norms over the sequence, as the authors' code does (later tokens
    are seen).
    pooling: "mean" over the anti-diagonal cells of a block pair (published, cheap), their "max", or "mass", an
    estimate of the attention that a block holds (selects best). None: "mean" under the published schedule, else "mass";
    docs/design.md says what was measured.
    score_dtype: "fp8" computes the block scores of max pooling, or of mass pooling, from e4m3 copies of q and k, or of
    their means, where the GPU has such matrix units (Hopper; elsewhere it changes nothing): nearly the same blocks in
    less time. The attention
    itself stays in the model's dtype.
    stride: tokens a group in the pooling, or a pair (queries, keys) under mass pooling; None is 8 there, else 16.
    share: who shares a row's budget under mass pooling: "heads" of the whole attention, a "group" of query heads with
    one key head (so that tensor-parallel ranks agree) or "none"; None is "heads" where a budget or coverage is given.
    kept: part of its own budget that every head keeps.
    block_size: queries a row block. key_block_size: keys a block; None is
    block_size.
    sink_blocks, local_blocks: first and last blocks of a row that are always computed, in units of block_size. None:
    the published 4 and 4 under the published schedule, 1 and 2 with ``budget=``, where fixed blocks would eat what is
    asked for.
    dense_layers: that many first attentions of the model stay dense, or the indices of those that do.
    min_length: prompts with fewer keys stay dense; None lets the policy decide and, on a GPU, a measurement
    (kernels/crossover.py).
    prompt_length: tokens of the whole prompt when it is prefilled in chunks, so that chunks select as one shot would;
    None is each call's length. A chunk that cuts a block of queries in two stays dense.
    context_parallel: 1-D DeviceMesh or process group over whose ranks the tokens of a sequence are split, as
    ``stem_compile.distributed.shard`` splits them, or the split that ``stem_compile.distributed.balanced`` makes for
    one; context_parallel_order is shard's ``order``. Then no attention stays dense for its length, ``dense_layers``
    compute all blocks, and what cannot be rewritten is an error.
    inner: the backend that gets the rewritten graph. mode: Inductor's mode ("reduce-overhead", "max-autotune", ...),
    since torch.compile takes either ``mode=`` or ``options=``. fallback: "dense" leaves an attention that cannot be
    rewritten as it is, and answers a call whose kernel fails by dense attention; "error" raises. when_dense: what to
    do where a model's long prompt stays dense as a whole: "warn" once, "silent" or "error".
    fuel: rewrite only the first ``fuel`` attentions, to bisect a wrong answer; None is all. verify: check every pass's
    result (slow).
    policy_options: options that the policy itself defines, by name. In ``options={...}`` they stand beside the others:
    ``{"policy": "toy", "toy_strength": 3}``.
    """

    policy: str = "stem"
    budget: float | tuple[float, ...] | None = None
    coverage: float | None = None
    cap: float = 0.5
    mu: float = 0.7
    beta: float = 0.2
    metric: str = "paper"
    pooling: str | None = None
    score_dtype: str = "native"
    stride: int | tuple[int, int] | None = None
    share: str | None = None
    kept: float = 0.5
    block_size: int = 128
    key_block_size: int | None = None
    sink_blocks: int | None = None
    local_blocks: int | None = None
    dense_layers: int | tuple[int, ...] = 0
    min_length: int | None = None
    prompt_length: int | None = None
    context_parallel: TokenSplit | None = None
    context_parallel_order: str = "zigzag"
    inner: str = "inductor"
    mode: str | None = None
    fallback: str = "dense"
    when_dense: str = "warn"
    fuel: int | None = None
    verify: bool = False
    policy_options: tuple[tuple[str, OptionValue], ...] = ()

    def __post_init__(self) -> None:
        for name in ("dense_layers", "budget", "stride"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        _one_of("policy", self.policy, policies.names())
        object.__setattr__(self, "policy_options", _policy_options(self.policy, self.policy_options))
        if self.context_parallel is not None:
            try:
                split = TokenSplit.of(self.context_parallel, self.context_parallel_order)
            except SplitError as error:
                raise OptionError(str(error)) from None
            object.__setattr__(self, "context_parallel", split)
        _one_of("context_parallel_order", self.context_parallel_order, ORDERS)
        _one_of("metric", self.metric, METRICS)
        if self.pooling is not None:
            _one_of("pooling", self.pooling, POOLINGS)
        _one_of("score_dtype", self.score_dtype, SCORE_DTYPES)
        _one_of("inner", self.inner, INNER)
        _one_of("fallback", self.fallback, FALLBACK)
        _one_of("when_dense", self.when_dense, WHEN_DENSE)
        if self.mode is not None:
            _one_of("mode", self.mode, MODES)
        _one_of("block_size", self.block_size, QUERY_BLOCKS)
        if self.key_block_size is not None:
            _one_of("key_block_size", self.key_block_size, KEY_BLOCKS)
        self._check_stride()
        if self.share is not None:
            _one_of("share", self.share, SHARES)
        _number("kept", self.kept, 0, 1)
        _number("mu", self.mu, 0, 1)
        _number("beta", self.beta, 0, 1e6)
        self._check_budget()
        for name, low in (
            ("sink_blocks", 0),
            ("local_blocks", 1),
            ("min_length", 0),
            ("prompt_length", 1),
            ("fuel", 0),
        ):
            value = getattr(self, name)
            if value is None and _FIELDS[name].default is None:
                continue
            if not _is_integer(value) or value < low:
                raise OptionError(f"{name}={value!r}: an integer of at least {low}")
        layers = self.dense_layers if isinstance(self.dense_layers, tuple) else (self.dense_layers,)
        if not all(_is_integer(n) and n >= 0 for n in layers):
            raise OptionError(
                f"dense_layers={self.dense_layers!r}: a number of first attentions, or a tuple of attention indices,"
                " none negative"
            )
        if not isinstance(self.verify, bool):
            raise OptionError(f"verify={self.verify!r}: True or False")

    def _check_stride(self) -> None:
        strides = self.stride if isinstance(self.stride, tuple) else (self.stride,) * (self.stride is not None)
        if isinstance(self.stride, tuple) and len(strides) != 2:
            raise OptionError(f"stride={self.stride!r}: tokens a group, or a pair of queries and keys a group")
        for stride in strides:
            _one_of("stride", stride, STRIDES)
        if isinstance(self.stride, tuple) and not self.by_mass:
            raise OptionError(f"stride={self.stride!r}: a pair is for pooling='mass'; other poolings take one number")

    def _check_budget(self) -> None:
        budgets = self.budget if isinstance(self.budget, tuple) else (self.budget,)
        for budget in budgets or (0,):
            if not (budget is None and not isinstance(self.budget, tuple)) and not _is_part(budget):
                raise OptionError(
                    f"budget={self.budget!r}: a part of the causal block pairs in (0, 1], one for each attention of the"
                    " model in turn (the last also for those that follow), or None for the published length schedule"
                )
        for name in ("coverage", "cap"):
            value = getattr(self, name)
            if not (value is None and name == "coverage") and not _is_part(value):
                raise OptionError(f"{name}={value!r}: a number in (0, 1]")
        if self.coverage is not None and self.budget is not None:
            raise OptionError(
                f"coverage={self.coverage!r} stands in place of a budget: leave budget={self.budget!r} out; cap= is the"
                " most that may be computed"
            )
        for name, plain in (("share", ("none", None)), ("coverage", (None,))):
            if getattr(self, name) not in plain and not self.by_mass:
                raise OptionError(
                    f"{name}={getattr(self, name)!r} compares masses of attention: it needs pooling='mass', not"
                    f" {self.selection_of(0).pooling!r}"
                )

    @property
    def by_mass(self) -> bool:
        """Whether blocks are ranked by pooled mass."""
        return (self.pooling or _default_pooling(self.budget is None and self.coverage is None)) == "mass"

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | StemConfig | None) -> StemConfig:
        """Config of ``torch.compile``'s options. Raises OptionError for an unknown name, naming the nearest one."""
        if isinstance(options, StemConfig):
            return options
        if options is not None and not isinstance(options, Mapping):
            raise OptionError(f"options={options!r}: a dict of options such as {{'budget': 0.25}}, or a StemConfig")
        values = dict(options or {})
        extra = {name: values.pop(name) for name in [n for n in values if n not in _FIELDS]}
        if extra:
            own = _options_of(values.get("policy", _FIELDS["policy"].default))
            for name in extra:
                if name not in own:
                    raise OptionError(_unknown(name, [*(n for n in _FIELDS if n != "policy_options"), *own]))
            values["policy_options"] = {**dict(values.get("policy_options", ())), **extra}
        if os.environ.get("STEM_COMPILE_VERIFY", "") not in ("", "0"):
            values.setdefault("verify", True)
        return cls(**values)

    @property
    def selection(self) -> SelectionSpec:
        """The part that a selection depends on, of the first attention."""
        return self.selection_of(0)

    def selection_of(self, index: int) -> SelectionSpec:
        """The part that the selection of attention number ``index`` of the model depends on."""
        budget = self.budget[min(index, len(self.budget) - 1)] if isinstance(self.budget, tuple) else self.budget
        if self.context_parallel is not None and self.keeps_dense(index):
            return dataclasses.replace(self, dense_layers=0, budget=1.0, coverage=None).selection_of(index)
        published = budget is None and self.coverage is None
        pooling = self.pooling or _default_pooling(published)
        sinks, locals_ = (4, 4) if published else (1, 2)
        stride = (8 if pooling == "mass" else 16) if self.stride is None else self.stride
        queries, keys = stride if isinstance(stride, tuple) else (stride, stride)
        by_mass = pooling == "mass"
        return SelectionSpec(
            policy=self.policy,
            budget=float(self.cap) if self.coverage is not None else None if budget is None else float(budget),
            mu=float(self.mu),
            beta=float(self.beta),
            metric=self.metric,
            pooling=pooling,
            stride=queries,
            key_stride=keys if keys != queries else 0,
            share=self.share or ("heads" if by_mass and not published else "none"),
            kept=float(self.kept) if by_mass else SelectionSpec.kept,
            coverage=None if self.coverage is None else float(self.coverage),
            score_dtype=self.score_dtype,
            block_q=self.block_size,
            block_k=self.key_block_size or self.block_size,
            sink_blocks=sinks if self.sink_blocks is None else self.sink_blocks,
            local_blocks=locals_ if self.local_blocks is None else self.local_blocks,
            prompt_length=self.prompt_length or 0,
            options=self.policy_options,
        )

    @property
    def takes_any_order(self) -> bool:
        """Whether the policy means something for attention without a causal order."""
        return policies.get(self.policy).ANY_ORDER

    @property
    def shortest(self) -> int:
        """Prompts with fewer keys than this stay dense."""
        return policies.get(self.policy).min_length(self.selection) if self.min_length is None else self.min_length

    def asks(self, first: int, used: int, count: int) -> tuple[tuple[bool, ...], int]:
        """(which of ``count`` attentions from number ``first`` on stay dense, how many of the others may be rewritten
        after ``used`` were)."""
        left = count if self.fuel is None else min(count, max(0, self.fuel - used))
        return tuple(self.keeps_dense(first + n) for n in range(count)), left

    def keeps_dense(self, index: int) -> bool:
        """Whether attention number ``index`` of the model is to stay dense."""
        return index in self.dense_layers if isinstance(self.dense_layers, tuple) else index < self.dense_layers


def written_options(pairs: Iterable[str]) -> dict[str, Any]:
    """Options of NAME=VALUE texts, such as "budget=0.25" or "pooling=max", validated. Raises OptionError."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = (part.strip() for part in pair.partition("="))
        if not equals:
            raise OptionError(f"{pair!r}: write NAME=VALUE, such as budget=0.25")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
    StemConfig.from_options(values)
    return values


_FIELDS = {f.name: f for f in dataclasses.fields(StemConfig)}


def _options_of(policy: Any) -> dict[str, Option]:
    """Options that a policy defines. Raises OptionError for a policy that cannot be used."""
    _one_of("policy", policy, policies.names())
    try:
        own = policies.options(policy)
    except RegistryError as error:
        raise OptionError(f"policy={policy!r}: {error}") from None
    taken = sorted(own.keys() & (_FIELDS.keys() | {f.name for f in dataclasses.fields(SelectionSpec)}))
    if taken:
        raise OptionError(f"policy={policy!r}: its option {taken[0]!r} has the name of one that is there already")
    return own


def _policy_options(policy: str, given: Any) -> tuple[tuple[str, OptionValue], ...]:
    """Sorted (name, value) pairs of the policy's own options that differ from their defaults. Raises OptionError."""
    own = _options_of(policy)
    values: dict[str, OptionValue] = {}
    try:
        pairs = dict(given)
    except (TypeError, ValueError):
        raise OptionError(f"policy_options={given!r}: a dict of options that the policy defines") from None
    for name, value in pairs.items():
        if name not in own:
            raise OptionError(_unknown(name, list(own), f" of policy {policy!r}"))
        try:
            values[name] = own[name].checked(value)
        except ValueError as error:
            raise OptionError(str(error)) from None
    return tuple(sorted((name, value) for name, value in values.items() if value != own[name].default))


def _unknown(name: Any, known: list[str], where: str = "") -> str:
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return f"unknown option {name!r}{where}{hint} Options: {', '.join(known) or 'none'}"


def _default_pooling(published: bool) -> str:
    return "mean" if published else "mass"


def _is_part(value: Any) -> bool:
    return _is_number(value) and 0 < value <= 1


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(name: str, value: Any, low: float, high: float) -> None:
    if not _is_number(value) or not low <= value <= high:
        raise OptionError(f"{name}={value!r}: a number in [{low}, {high:g}]")


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    # By type too: 64.0 == 64, but is written as another text into graphs and kernels.
    if not any(type(value) is type(a) and value == a for a in allowed):
        near = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1, cutoff=0.5)
        hint = next((f"; did you mean {a!r}?" for a in allowed if [str(a)] == near and isinstance(value, str)), "")
        raise OptionError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}{hint}")
