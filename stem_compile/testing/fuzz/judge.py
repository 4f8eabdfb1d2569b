"""The verdict on one script: wrong, raised, left dense by a failure of ours, refused with a reason, or rewritten.

The witness is the module itself, uncompiled, in fp64, with positions as the module computes them in its own dtype
(``testing.exact``). Under a budget below 1 the module is told which blocks were selected and masks its own scores by
them. Nothing here knows how an attention is matched or what its mask was read as.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stem_compile import backend
from stem_compile.passes.graph.values import module_path
from stem_compile.reasons import KernelWarning, Reason, StemWarning
from stem_compile.selection import Observed, observe
from stem_compile.testing import numerics
from stem_compile.testing.agreement import dense_of, forced
from stem_compile.testing.exact import doubled, exactly, golden_copy
from stem_compile.testing.violation import Violation

BAD = ("wrong", "raised", "internal")
"""Verdicts that are defects. The others: "rewritten" (at least one attention), "refused" (none), "void" (the module
itself fails, or its output is NaN everywhere)."""

BATCHED = ("q", "k", "v", "x", "past_k", "past_v", "cache_k", "cache_v", "padding", "docs", "given")
"""Inputs whose first dimension is the batch."""

Given = dict[str, torch.Tensor]
Inputs = Callable[[int], Given]


@dataclass(frozen=True)
class Outcome:
    """verdict: see ``BAD``. detail: what differs, or the exception. decisions: of every attention of the script, one of
    "rewritten", "unrecognised" or the name of a reason. ratio: largest error over its tolerance."""

    verdict: str
    detail: str = ""
    decisions: tuple[str, ...] = ()
    ratio: float = 0.0

    @property
    def bad(self) -> bool:
        """Whether the trial shows a defect."""
        return self.verdict in BAD

    def __str__(self) -> str:
        counted = ", ".join(self.decisions) or "no attention"
        return f"{self.verdict}: {self.detail or counted} (worst error {self.ratio:.2f} of its tolerance)"


@dataclass
class _Call:
    """One compiled call. selections: in order."""

    outputs: list[torch.Tensor] = field(default_factory=list)
    selections: list[Observed] = field(default_factory=list)


class _Bad(Exception):
    def __init__(self, verdict: str, detail: str) -> None:
        super().__init__(detail)
        self.verdict = verdict


class _Void(Exception):
    """The script says nothing."""


def judge(
    model: Callable[..., torch.nn.Module],
    inputs: Inputs,
    *,
    relation: str = "dense",
    options: Mapping[str, Any] | None = None,
    lengths: Sequence[int] = (70,),
    dynamic: bool | None = None,
    device: str = "cpu",
) -> Outcome:
    """Hold a script's ``Model`` and ``inputs`` to a relation.

    relation: "dense": every output is the module's own at budget 1.0, for each of ``lengths`` in one compiled module.
    "selection": it is the module's own restricted to the selected blocks. "heads", "batch", "groups" (key heads written
    out), "hidden" (contents of keys that no query sees), "shift" (all positions moved), "chunks" (a cached beginning
    against one shot): equal under that change. options: of the backend. dynamic: as for ``torch.compile``.
    """
    subject = _Subject(model, inputs, dict(options or {}), dynamic, device)
    worst = 0.0
    try:
        for length in lengths:
            worst = max(worst, RELATIONS[relation](subject, length))
    except _Void as reason:
        return Outcome("void", str(reason), subject.decisions)
    except _Bad as bad:
        return Outcome(bad.verdict, str(bad), subject.decisions, worst)
    rewritten = "rewritten" in subject.decisions
    return Outcome("rewritten" if rewritten else "refused", "", subject.decisions, worst)


class _Subject:
    """A script's module in the ways that relations compare."""

    def __init__(
        self, model: Callable[..., torch.nn.Module], inputs: Inputs, options: dict[str, Any], dynamic: Any, device: str
    ) -> None:
        torch.manual_seed(0)
        self.make, self.options, self.dynamic, self.device = model, options, dynamic, device
        self.model = model().eval().to(device)
        self.inputs: Inputs = lambda n: {name: x.to(device) for name, x in inputs(n).items()}
        self.expected = int(getattr(model, "attentions", 1))
        self._decided: list[list[Any]] = []
        self._compiled: dict[Any, Any] = {}
        self._called: list[Given] = []

    @property
    def decisions(self) -> tuple[str, ...]:
        """Of the last graph that was compiled."""
        words = [
            hit.reason.name.lower() if hasattr(hit, "reason") else "rewritten"
            for hit in (self._decided[-1] if self._decided else ())
        ]
        return (*words, *["unrecognised"] * (self.expected - len(words)))

    def own(self, given: Given, selected: Any = None, shown: Any = None) -> list[torch.Tensor]:
        """The module's own outputs. Raises _Void."""
        try:
            with torch.no_grad():
                return _listed(self.model(**given, selected=selected, shown=shown))
        except Exception as error:
            raise _Void(f"the module itself raises {_first(error)}") from error

    def golden(self, given: Given, selected: Any = None) -> list[torch.Tensor]:
        """The same in fp64."""
        try:
            with torch.no_grad():
                if not getattr(self.model, "watched", True):
                    return _listed(golden_copy(self.model)(**doubled(given), selected=selected))
                return _listed(exactly(self.model, (), {**given, "selected": selected}))
        except Exception as error:
            raise _Void(f"the module does not run in fp64: {_first(error)}") from error

    def visible(self, given: Given) -> torch.Tensor:
        """bool [b, h or 1, n, m]: keys that at least one attention shows."""
        shown: list[torch.Tensor] = []
        self.own(given, shown=shown)
        four = [m.reshape((1,) * (4 - m.dim()) + m.shape) if m.dim() != 3 else m[:, None] for m in shown]
        together = four[0]
        for mask in four[1:]:
            together = together | mask
        return together

    def rows(self, given: Given) -> torch.Tensor:
        """bool [b, n]: queries to which every attention shows a key."""
        shown: list[torch.Tensor] = []
        self.own(given, shown=shown)
        batch = next(x.shape[0] for name, x in given.items() if name in BATCHED)
        seeing: torch.Tensor = torch.ones((), dtype=torch.bool, device=self.device)
        for mask in shown:
            four = mask[:, None] if mask.dim() == 3 else mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
            seeing = seeing & four.any(-1).all(1)
        return seeing.expand(batch, -1)

    def call(self, given: Given, force: Any = None, model: torch.nn.Module | None = None, **changes: Any) -> _Call:
        """The compiled module. Raises _Bad."""
        key = (id(model), tuple(sorted(changes.items())))
        if key not in self._compiled:
            self._compiled[key] = torch.compile(
                model or self.model, backend=self._backend(self.options | changes), dynamic=self.dynamic, fullgraph=True
            )
        done = _Call()
        self._called.append(given)

        def note(observed: Observed) -> Any:
            done.selections.append(observed)
            return force(len(done.selections) - 1, observed) if force else None

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            # A kernel that fails is answered by dense attention, which would hide it.
            warnings.simplefilter("error", KernelWarning)
            try:
                with observe(note), torch.no_grad():
                    done.outputs = _listed(self._compiled[key](**given))
            except Violation as violation:
                raise _Bad("wrong", violation.message) from violation
            except Exception as error:
                self._captures()
                raise _Bad("raised", _first(error)) from error
        for warning in said:
            if issubclass(warning.category, StemWarning) and "left" in str(warning.message):
                raise _Bad("internal", str(warning.message))
        for hit in self._decided[-1] if self._decided else ():
            if getattr(hit, "reason", None) is Reason.INTERNAL:
                raise _Bad("internal", f"{module_path(hit.node)}: {hit.words}")
        return done

    def _backend(self, options: dict[str, Any]) -> Callable[..., Any]:
        def compiled(module: Any, examples: Any) -> Any:
            with backend.listen(lambda rewrite: self._decided.append(list(rewrite.attentions))):
                return backend.stem(module, examples, options=options)

        return compiled

    def _captures(self) -> None:
        """Whether Dynamo alone takes the module with all inputs so far, before a failure is called ours. Raises
        _Void."""
        torch._dynamo.reset()
        alone = torch.compile(self.model, backend="eager", dynamic=self.dynamic, fullgraph=True)
        try:
            with torch.no_grad():
                for given in self._called:
                    alone(**given)
        except Exception as error:
            raise _Void(f"Dynamo does not capture it: {_first(error)}") from error


def _listed(outputs: Any) -> list[torch.Tensor]:
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Dynamo's first line only says that a backend raised.
    said = lines[1:] if len(lines) > 1 and lines[0].startswith("backend=") else lines
    return f"{type(error).__name__}: {said[0] if said else ''}"


def _compared(
    actual: Sequence[torch.Tensor],
    golden: Sequence[torch.Tensor],
    allowed: Sequence[float],
    rows: torch.Tensor,
    what: str,
) -> float:
    """Largest error over its tolerance. Raises _Bad beyond it."""
    worst = 0.0
    for number, (a, g, most) in enumerate(zip(actual, golden, allowed, strict=True)):
        if a.shape != g.shape:
            raise _Bad("wrong", f"{what}: output {number} has shape {tuple(a.shape)} instead of {tuple(g.shape)}")
        gap = numerics.gap(a, g, most, _valid(rows, g))
        if not gap.ok:
            raise _Bad("wrong", f"{what}: output {number}: {gap.words} at {gap.where}")
        worst = max(worst, gap.ratio)
    return worst


def _valid(rows: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Positions that count, in the shape of an output's positions: a row that sees a key, and has a number."""
    shaped = rows if output.dim() == 3 else rows[:, None].expand(output.shape[:3])
    return shaped & ~output.isnan().any(-1)


def _budgets(own: Sequence[torch.Tensor], golden: Sequence[torch.Tensor], rows: torch.Tensor) -> list[float]:
    allowed = []
    for mine, exact in zip(own, golden, strict=True):
        valid = _valid(rows, exact) & ~mine.isnan().any(-1)
        if not bool(valid.any()):
            raise _Void("no row has a number")
        allowed.append(
            numerics.tolerance(
                mine.masked_fill(~valid[..., None], 0), exact.masked_fill(~valid[..., None], 0), mine.dtype, valid
            )
        )
    return allowed


def _dense(subject: _Subject, length: int) -> float:
    given = subject.inputs(length)
    own, golden = subject.own(given), subject.golden(given)
    golden = [_same_holes(mine, exact) for mine, exact in zip(own, golden, strict=True)]
    seeing = subject.rows(given)
    # A row that sees no key weighs what hides by its rounding: its error must not excuse the others'.
    groups = [rows for rows in (seeing, ~seeing) if _says_something(own, golden, rows)]
    if not groups:
        raise _Void("no row has a number")
    call = subject.call(given)
    what = f"{length} queries at budget 1.0"
    return max(_compared(call.outputs, golden, _budgets(own, golden, rows), rows, what) for rows in groups)


def _says_something(own: Sequence[torch.Tensor], golden: Sequence[torch.Tensor], rows: torch.Tensor) -> bool:
    """Whether every output has a number in one of these rows."""
    return all(bool((_valid(rows, x) & ~mine.isnan().any(-1)).any()) for mine, x in zip(own, golden, strict=True))


def _same_holes(own: torch.Tensor, golden: torch.Tensor) -> torch.Tensor:
    """The golden output without rows where the module itself, in its own dtype, gives no finite number."""
    return golden.masked_fill(~own.isfinite().all(-1, keepdim=True), torch.nan)


def _selection(subject: _Subject, length: int) -> float:
    given = subject.inputs(length)
    rows = subject.rows(given)
    call = subject.call(given)
    if "rewritten" not in subject.decisions:
        return 0.0
    if "unrecognised" in subject.decisions:
        raise _Void("which selection belongs to which attention is not known")
    selected = _selected(subject, given, call.selections)
    own, golden = subject.own(given, selected), subject.golden(given, selected)
    return _compared(call.outputs, golden, _budgets(own, golden, rows), rows, "under the selected blocks")


def _selected(subject: _Subject, given: Given, selections: Sequence[Observed]) -> list[torch.Tensor]:
    """What every attention of the script computed, bool [b, h, n, m]."""
    selected, queue = [], list(selections)
    count = subject.decisions.count("rewritten")
    if len(queue) != count:
        raise _Bad("wrong", f"{count} attentions were rewritten and {len(queue)} selected blocks when they ran")
    shown: list[torch.Tensor] = []
    subject.own(given, shown=shown)
    for decision, mask in zip(subject.decisions, shown, strict=True):
        if decision != "rewritten":
            selected.append(torch.ones_like(mask, dtype=torch.bool))
            continue
        observed = queue.pop(0)
        dense, (block_q, block_k) = (
            observed.selection.dense(observed.candidates),
            (observed.selection.block_q, observed.selection.block_k),
        )
        tokens = dense.repeat_interleave(block_q, 2)[:, :, : observed.attention.q.shape[2]]
        tokens = tokens.repeat_interleave(block_k, 3)[..., : observed.attention.k.shape[2]]
        batch = next(x.shape[0] for name, x in given.items() if name in BATCHED)
        selected.append(tokens.reshape(batch, -1, *tokens.shape[2:]))
    return selected


def _pair(
    subject: _Subject,
    given: Given,
    changed: Given,
    of_first: Callable[[torch.Tensor], torch.Tensor],
    what: str,
    wanted: Callable[[torch.Tensor], torch.Tensor] | None = None,
    model: torch.nn.Module | None = None,
    **changes: Any,
) -> float:
    """``changed`` gives what ``of_first`` makes of the outputs for ``given``. wanted: the same for selections."""
    own, golden = subject.own(given), subject.golden(given)
    rows = subject.rows(given)
    allowed = _budgets(own, golden, rows)
    first = subject.call(given, **changes)
    if "rewritten" not in subject.decisions:
        return 0.0
    decisions = subject.decisions
    expected = [of_first(x) for x in first.outputs]
    second = subject.call(changed, model=model, **changes)
    if subject.decisions != decisions:
        # One of the two stays dense, with a reason; so they are not comparable.
        return 0.0
    counted = subject.rows(changed)
    try:
        return _compared(second.outputs, expected, allowed, counted, what)
    except _Bad:
        if wanted is None or len(second.selections) != len(first.selections):
            raise
        # Rounding may have told two equal blocks apart: compute what the first run did, if that was a tie.
        force = forced([wanted(d) for d in dense_of(first.selections)], what)
        again = subject.call(changed, force, model=model, **changes)
        return _compared(again.outputs, expected, allowed, counted, what)


def _batch(subject: _Subject, length: int) -> float:
    given = subject.inputs(length)
    batch = next(x.shape[0] for name, x in given.items() if name in BATCHED)
    order = torch.arange(batch - 1, -1, -1, device=subject.device)
    changed = {n: x[order] if n in BATCHED else x for n, x in given.items()}
    return _pair(
        subject, given, changed, lambda x: x[order], "rows of the batch change places", lambda d: _reordered(d, order)
    )


def _reordered(dense: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    if dense.shape[0] == len(order):
        return dense[order]
    # Batch and heads in one dimension.
    return dense.unflatten(0, (len(order), -1))[order].flatten(0, 1) if dense.shape[0] > 1 else dense


def _heads(subject: _Subject, length: int) -> float:
    given = subject.inputs(length)
    heads, groups = given["q"].shape[1], given["k"].shape[1]
    order = torch.arange(groups - 1, -1, -1, device=subject.device)
    queries = (order[:, None] * (heads // groups) + torch.arange(heads // groups, device=subject.device)).flatten()
    changed = {
        n: x[:, queries] if n == "q" else x[:, order] if n in ("k", "v") else x[queries] if n == "sink" else x
        for n, x in given.items()
    }

    def moved(x: torch.Tensor) -> torch.Tensor:
        return x[:, queries] if x.dim() == 4 else x.unflatten(-1, (heads, -1))[:, :, queries].flatten(2)

    return _pair(
        subject, given, changed, moved, "heads change places", lambda d: d[:, queries] if d.shape[1] == heads else d
    )


def _groups(subject: _Subject, length: int) -> float:
    given = subject.inputs(length)
    group = given["q"].shape[1] // given["k"].shape[1]
    changed = {n: x.repeat_interleave(group, 1) if n in ("k", "v") else x for n, x in given.items()}
    return _pair(subject, given, changed, lambda x: x, "key heads are written out", lambda d: d)


def _hidden(subject: _Subject, length: int) -> float:
    given = subject.inputs(length)
    hidden = ~subject.visible(given).any(-2).any(1)
    generator = torch.Generator().manual_seed(1)
    changed = dict(given)
    columns = hidden.shape[-1]
    for name in ("k", "v", "past_k", "past_v", "cache_k", "cache_v"):
        if name not in given:
            continue
        x, size = given[name], given[name].shape[2]
        first = 0 if name.startswith(("past", "cache")) else _first_query(given, columns, size)
        place = hidden[:, None, first : first + size, None].expand(x.shape[0], -1, -1, -1)
        other = (8 * torch.randn(x.shape, generator=generator)).to(x)
        changed[name] = torch.where(place, other, x)
    return _pair(subject, given, changed, lambda x: x, "contents of keys that nobody sees", lambda d: d)


def _first_query(given: Given, columns: int, queries: int) -> int:
    """Position of the first query among ``columns`` keys."""
    if "cache_k" in given:
        return columns - queries - 13
    return columns - queries


def _shift(subject: _Subject, length: int) -> float:
    given = subject.inputs(length)
    torch.manual_seed(0)
    moved = subject.make(shift=64).eval().to(subject.device)
    moved.load_state_dict(subject.model.state_dict())
    return _pair(subject, given, given, lambda x: x, "all positions move by 64", lambda d: d, model=moved)


def _chunks(subject: _Subject, length: int) -> float:
    chunk = subject.inputs(length)
    past, total = chunk["past_k"].shape[2], chunk["past_k"].shape[2] + length
    generator = torch.Generator().manual_seed(2)
    before = torch.randn((*chunk["q"].shape[:2], past, chunk["q"].shape[3]), generator=generator).to(chunk["q"])
    whole = dict(chunk) | {
        "q": torch.cat([before, chunk["q"]], 2),
        "k": torch.cat([chunk["past_k"], chunk["k"]], 2),
        "v": torch.cat([chunk["past_v"], chunk["v"]], 2),
        "past_k": chunk["past_k"][:, :, :0],
        "past_v": chunk["past_v"][:, :, :0],
    }
    block = int(subject.options.get("block_size", 128))

    def behind(x: torch.Tensor) -> torch.Tensor:
        return x[:, past:] if x.dim() == 3 else x[:, :, past:]

    wanted = (lambda d: d[:, :, past // block :]) if past % block == 0 else None
    return _pair(
        subject, whole, chunk, behind, f"{length} queries behind {past} against one shot", wanted, prompt_length=total
    )


RELATIONS: dict[str, Callable[[_Subject, int], float]] = {
    "dense": _dense,
    "selection": _selection,
    "heads": _heads,
    "batch": _batch,
    "groups": _groups,
    "hidden": _hidden,
    "shift": _shift,
    "chunks": _chunks,
}
