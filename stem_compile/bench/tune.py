"""The fastest options of the backend whose answers stay within a bound on the user's own text.

Three stages, each of the uncompiled rest of the model (``inner="eager"``), which changes no selection: families of
selection options are compared at one budget, the least budget within the bound is searched for the best of them, and
what is left is timed as the user would run it.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stem_compile.bench.contender import Contender
from stem_compile.bench.fidelity import Reader, fidelity
from stem_compile.bench.samples import Sample
from stem_compile.bench.target import Target
from stem_compile.config import OptionError, StemConfig
from stem_compile.selection import Observed, observe
from stem_compile.selection.density import causal_density
from stem_compile.timing import in_turns, timed

BUDGETS = (0.03125, 0.0442, 0.0625, 0.0884, 0.125, 0.177, 0.25, 0.354, 0.5, 0.707)
"""Budgets that are tried, two steps a doubling."""
FIRST_BUDGET = 0.25
"""Budget at which families are compared."""
FAMILIES: tuple[dict[str, Any], ...] = (
    {},
    {"key_block_size": 64, "stride": 8},
    {"pooling": "mass"},
    {"pooling": "mass", "share": "heads"},
    {"pooling": "mass", "share": "heads", "key_block_size": 64},
    {"sink_blocks": 1, "local_blocks": 1, "key_block_size": 64, "stride": 8},
    {"dense_layers": 1},
)
"""Selection options that are compared, in the order in which they are tried. Those that this version or the user's own
options do not allow are left out."""
SAME = 0.02
"""Part by which densities differ at least to count as different."""
FINALISTS = 2
"""Families whose least budget is searched."""


@dataclass(frozen=True)
class Bound:
    """The most that may change, nats: mean over the second half of a text, on the worst text. None is no bound."""

    kl: float | None = None
    nll: float | None = None

    def excess(self, means: Mapping[str, Mapping[str, float]]) -> float:
        """How far the worst text is from the bound: 1 is at it, more is beyond. means: text -> ``Fidelity.summary``."""
        ratios = [
            max(text[measure], 0.0) / limit
            for measure, limit in (("kl", self.kl), ("nll change", self.nll))
            if limit is not None
            for text in means.values()
            if measure in text
        ]
        return max(ratios, default=float("inf"))

    @property
    def words(self) -> str:
        """Such as ``KL at most 0.02``."""
        parts = [("KL", self.kl), ("change of NLL", self.nll)]
        return " and ".join(f"{name} at most {limit:g}" for name, limit in parts if limit is not None)


@dataclass
class Trial:
    """One setting that was tried. excess: its worst text relative to the bound, at most 1 is within. texts: text ->
    means over its second half. seconds: of one call with ``inner="eager"``; final_seconds: median time to first token
    as the user would run it, where it came to that. density: mean over rewritten attentions, None where none were."""

    options: dict[str, Any]
    excess: float
    texts: dict[str, dict[str, float]]
    seconds: float
    density: float | None
    final_seconds: float | None = None

    @property
    def within(self) -> bool:
        """Whether the bound is kept."""
        return self.excess <= 1

    def words(self) -> str:
        """The options and what they gave."""
        kl = max(text["kl"] for text in self.texts.values())
        options = ", ".join(f"{k}={v!r}" for k, v in self.options.items()) or "defaults"
        return f"{options}: KL {kl:.4f}, {'within' if self.within else 'beyond'} the bound"


@dataclass
class Search:
    """State of a search. dense_seconds: one eager call. eager_seconds, inductor_seconds: medians beside the finalists;
    None until they are timed."""

    trials: list[Trial] = field(default_factory=list)
    dense_seconds: float = 0.0
    eager_seconds: float | None = None
    inductor_seconds: float | None = None

    @property
    def best(self) -> Trial | None:
        """The fastest trial within the bound; None where none is, or where dense attention was faster."""
        within = [t for t in self.trials if t.within]
        final = [t for t in within if t.final_seconds is not None]
        if not final:
            return min((t for t in within if t.seconds < self.dense_seconds), key=lambda t: t.seconds, default=None)
        fastest = min(final, key=lambda t: t.final_seconds or 0.0)
        dense = min(s for s in (self.eager_seconds, self.inductor_seconds, float("inf")) if s is not None)
        return fastest if (fastest.final_seconds or 0.0) < dense else None


def families(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """``FAMILIES`` with the user's ``options``, which win, each selection once."""
    out: list[dict[str, Any]] = []
    known = set()
    for family in FAMILIES:
        merged = {**family, **options}
        try:
            config = StemConfig.from_options({**merged, "budget": FIRST_BUDGET})
        except OptionError:
            continue
        key = (config.selection, config.dense_layers)
        if key not in known:
            known.add(key)
            out.append(merged)
    return out


def distinct_budgets(family: Mapping[str, Any], tokens: int) -> list[float]:
    """Those of ``BUDGETS`` that compute something else at ``tokens`` tokens than the next larger one, ascending; all
    for 0 tokens. Where forced blocks are all there is, a smaller budget would be chosen without having been tried."""
    kept: list[float] = []
    last = float("inf")
    for budget in reversed(BUDGETS):
        spec = StemConfig.from_options({**family, "budget": budget}).selection
        density = causal_density(spec, tokens) if tokens else budget
        if density < (1 - SAME) * last:
            kept.append(budget)
            last = density
    return kept[::-1]


class Tuner:
    """Runs trials on one model and its texts. device: where both are."""

    def __init__(self, target: Target, texts: Sequence[Sample], bound: Bound, device: str) -> None:
        self.reader, self.texts, self.bound, self.device = Reader.of(target), texts, bound, device
        self.search, self.tokens = Search(), texts[0].tokens
        self._references: dict[str, torch.Tensor] = {}

    def reference(self) -> None:
        """Run the model itself on every text."""
        for text in self.texts:
            with torch.inference_mode():
                milliseconds, out = timed(lambda t=text: self.reader.module(*t.args, **t.kwargs), self.device)  # type: ignore[misc]
            self._references[text.name] = self.reader.rows(out)
            self.search.dense_seconds += milliseconds / 1e3 / len(self.texts)

    def trial(self, options: Mapping[str, Any]) -> Trial:
        """Run the model under ``options`` on every text, and add it to the search."""
        known = next((t for t in self.search.trials if t.options == dict(options)), None)
        if known is not None:
            return known
        torch._dynamo.reset()
        function = torch.compile(self.reader.module, backend="stem", options={**options, "inner": "eager"})
        means: dict[str, dict[str, float]] = {}
        selections: list[float] = []
        seconds = 0.0
        for number, text in enumerate(self.texts):

            def note(observed: Observed, number: int = number) -> None:
                # Densities of the first text are enough, and reading them takes time.
                if number == 0:
                    selections.append(observed.density)

            with observe(note), torch.inference_mode():
                milliseconds, out = timed(lambda t=text: function(*t.args, **t.kwargs), self.device)  # type: ignore[misc]
            # The first call is traced as well; the others tell the time.
            seconds = milliseconds / 1e3 if number == 0 else min(seconds, milliseconds / 1e3)
            comparison = fidelity(self.reader, self._references[text.name], self.reader.rows(out), text.ids)
            means[text.name] = comparison.summary()
        outcome = Trial(
            dict(options),
            self.bound.excess(means),
            means,
            seconds,
            statistics.fmean(selections) if selections else None,
        )
        self.search.trials.append(outcome)
        return outcome

    def least_budget(self, family: Mapping[str, Any], doing: Callable[[str], None]) -> Iterator[Trial]:
        """Trials of a bisection for the least budget within the bound."""
        budgets = distinct_budgets(family, self.tokens)
        low, high = 0, len(budgets)
        while low < high:
            middle = (low + high) // 2
            if low == 0 and high == len(budgets) and FIRST_BUDGET in budgets:
                middle = budgets.index(FIRST_BUDGET)
            doing(f"budget {budgets[middle]:g}")
            trial = self.trial({**family, "budget": budgets[middle]})
            yield trial
            if trial.within:
                high = middle
            else:
                low = middle + 1

    def time_finalists(self, most: int, repeats: int, doing: Callable[[str], None]) -> None:
        """Time the ``most`` fastest trials within the bound beside eager and Inductor, in turns, on the first text."""
        finalists = sorted((t for t in self.search.trials if t.within), key=lambda t: t.seconds)[:most]
        if not finalists:
            return
        torch._dynamo.reset()
        text = self.texts[0]
        entered = [Contender("eager"), Contender("inductor", "inductor")]
        entered += [Contender(f"finalist {i}", "stem", t.options) for i, t in enumerate(finalists)]
        compiled = {c.name: c.compile(self.reader.module, fullgraph=False) for c in entered}
        calls = {name: functools.partial(f, *text.args, **text.kwargs) for name, f in compiled.items()}
        with torch.inference_mode():
            for contender in entered:
                doing(f"compiling {contender.name}")
                calls[contender.name]()
            times = in_turns(calls, self.device, turns=repeats, before=lambda name, turn: doing(f"timing {name}"))
        self.search.eager_seconds = times["eager"].median / 1e3
        self.search.inductor_seconds = times["inductor"].median / 1e3
        for i, trial in enumerate(finalists):
            trial.final_seconds = times[f"finalist {i}"].median / 1e3


def tune(
    tuner: Tuner, options: Mapping[str, Any], repeats: int, doing: Callable[[str], None] = lambda what: None
) -> Iterator[str]:
    """Search; yields what each finished part gave. ``tuner.search`` holds what is known at any time."""
    doing("the model itself")
    tuner.reference()
    yield f"the model itself: {tuner.search.dense_seconds:.1f} s a text"
    first: list[tuple[float, dict[str, Any]]] = []
    for family in families(options):
        doing(f"{family or 'defaults'}")
        trial = tuner.trial({**family, "budget": FIRST_BUDGET})
        # Fidelity at one budget is compared at the density that it gave, since forced blocks differ.
        first.append((trial.excess * (trial.density or 1.0), family))
        yield trial.words()
    for _, family in sorted(first, key=lambda pair: pair[0])[:FINALISTS]:
        for trial in tuner.least_budget(family, doing):
            yield trial.words()
    tuner.time_finalists(1 if tuner.device.startswith("cpu") else 3, repeats, doing)
    yield "timed beside eager and Inductor"


def steps(options: Mapping[str, Any]) -> int:
    """Most parts that ``tune`` yields."""
    return 2 + len(families(options)) + FINALISTS * len(BUDGETS).bit_length()


def to_dict(search: Search) -> dict[str, Any]:
    """For JSON."""
    return dataclasses.asdict(search)
