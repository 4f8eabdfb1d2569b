"""What sparse attention changes in a language model's answers: distributions, likelihoods, top-1, pass keys and layers,
at several budgets, against eager."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stem_compile.bench.contender import Contender
from stem_compile.bench.fidelity import Reader, errors_by_layer, fidelity
from stem_compile.bench.passkey import Haystack, answered, haystack
from stem_compile.bench.prefill import Prefill
from stem_compile.bench.samples import Sample
from stem_compile.bench.target import Target
from stem_compile.packages import UserError
from stem_compile.selection import Observed, observe
from stem_compile.timing import in_turns

POSITIONS = (0.0, 0.35, 0.65, 1.0)
"""Depths of the pass keys; not 1/3 and 2/3, so that no needle begins with a block."""
LAYER_TOKENS = 4096
"""Most tokens at which errors by layer are measured: hidden states of all layers are held at once."""
GRAPHS = 64
"""Compiled graphs of one module that Dynamo may keep: every contender has its own."""


@dataclass
class Outcome:
    """One contender. seconds: median time to first token on the first text. density: computed part of the visible block
    pairs, mean over rewritten attentions; None where nothing was selected. texts: text -> means over its second half
    ("kl", "nll change", "same top-1"). positions: (last position, mean KL, part of equal top-1) over the texts' length.
    layers: relative error of the hidden states after each layer. keys: (number of keys, tokens, position) -> answered.
    """

    name: str
    options: dict[str, Any]
    seconds: float = 0.0
    density: float | None = None
    texts: dict[str, dict[str, float]] = field(default_factory=dict)
    positions: list[tuple[int, float, float]] = field(default_factory=list)
    layers: list[float] = field(default_factory=list)
    keys: dict[tuple[int, int, float], bool] = field(default_factory=dict)

    def mean(self, measure: str) -> float | None:
        """Mean of a measure over the texts; None where it was not measured."""
        values = [means[measure] for means in self.texts.values() if measure in means]
        return statistics.fmean(values) if values else None

    def answered(self, keys: int) -> float | None:
        """Part of the questions answered in texts with so many keys; None where none were asked."""
        values = [right for (number, _, _), right in self.keys.items() if number == keys]
        return sum(values) / len(values) if values else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        keys = [{"keys": n, "tokens": t, "position": p, "answered": right} for (n, t, p), right in self.keys.items()]
        return {**self.__dict__, "keys": keys}


def haystacks(target: Target, lengths: Sequence[int]) -> list[Haystack]:
    """Texts with one key at each of ``POSITIONS`` and with four keys at once, for every length; none for a target
    without a tokenizer."""
    try:
        tokenizer = target.tokenizer()
    except UserError:
        return []
    layouts = [*((p,) for p in POSITIONS), POSITIONS]
    return [haystack(tokenizer, tokens, layout) for tokens in lengths for layout in layouts]


def contenders(budgets: Sequence[float], options: Mapping[str, Any]) -> list[Contender]:
    """Eager and every budget; options: the backend's further ones."""
    return [
        Contender("eager"),
        *(Contender(f"budget {budget:g}", "stem", {**options, "budget": budget}) for budget in budgets),
    ]


def measure(
    target: Target,
    texts: Sequence[Sample],
    hays: Sequence[Haystack],
    entered: Sequence[Contender],
    repeats: int,
    device: str,
    doing: Callable[[str], None],
) -> Iterator[tuple[str, list[Outcome]]]:
    """(what was finished, all outcomes so far) part by part; ``parts`` says how many there are. The first of
    ``entered`` is what the others are compared with. Raises UserError where outputs are no logits."""
    reader = Reader.of(target)
    outcomes: list[Outcome] = []
    references: dict[str, torch.Tensor] = {}
    calls: dict[str, Callable[[], object]] = {}
    with torch._dynamo.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=4 * GRAPHS):
        for contender in entered:
            function = _compiled(reader.module, contender)
            outcome = Outcome(contender.name, contender.options)
            outcomes.append(outcome)
            calls[contender.name] = functools.partial(function, *texts[0].args, **texts[0].kwargs)
            for text in texts:
                doing(f"{contender.name}: {text.name}")
                _read(reader, function, text, outcome, references)
                yield f"{contender.name}: {text.name}, KL {outcome.texts[text.name]['kl']:.4f}", outcomes
            for hay in hays if isinstance(reader.module, Prefill) else ():
                doing(f"{contender.name}: {_words(hay)}")
                with torch.inference_mode():
                    cache = function(torch.tensor([hay.ids], device=device))[2]
                right = answered(target.model, hay, cache)
                outcome.keys |= {(len(right), hay.tokens, p): r for p, r in zip(hay.positions, right)}
                yield f"{contender.name}: {_words(hay)}, {sum(right)} answered", outcomes
            if contender.backend is not None and texts[0].ids is not None:
                doing(f"{contender.name}: errors by layer")
                compile_ = functools.partial(_compiled, contender=contender)
                outcome.layers = errors_by_layer(target, compile_, texts[0].ids[:, :LAYER_TOKENS])
        with torch.inference_mode():
            times = in_turns(calls, device, turns=repeats, before=lambda name, turn: doing(f"{name}: timed run"))
    for outcome in outcomes:
        outcome.seconds = times[outcome.name].median / 1e3
    yield "times", outcomes


def parts(texts: Sequence[Sample], hays: Sequence[Haystack], entered: Sequence[Contender]) -> int:
    """How many parts ``measure`` yields where all of its questions are asked."""
    return len(entered) * (len(texts) + len(hays)) + 1


def _compiled(module: torch.nn.Module, contender: Contender) -> Callable[..., Any]:
    """One graph for all lengths: prompts with keys differ by a few tokens."""
    if contender.backend is None:
        return module
    compiled: Callable[..., Any] = torch.compile(
        module, backend=contender.backend, options=contender.options or None, dynamic=True
    )
    return compiled


def _read(
    reader: Reader, function: Callable[..., Any], text: Sample, outcome: Outcome, references: dict[str, torch.Tensor]
) -> None:
    """Add what ``function`` makes of one text to ``outcome``. references: rows of the first contender, by text."""
    selections: list[Observed] = []
    with observe(selections.append), torch.inference_mode():
        rows = reader.rows(function(*text.args, **text.kwargs))
    if selections:
        outcome.density = statistics.fmean(s.density for s in selections)
    reference = references.setdefault(text.name, rows)
    comparison = fidelity(reader, reference, rows, text.ids)
    outcome.texts[text.name] = comparison.summary()
    mine = comparison.by_position()
    before = outcome.positions or mine
    done = len(outcome.texts)
    outcome.positions = [
        (end, (kl * (done - 1) + k) / done, (top * (done - 1) + t) / done)
        for (end, kl, top), (_, k, t) in zip(before, mine)
    ]


def _words(hay: Haystack) -> str:
    where = f"a key at {hay.positions[0]:.0%}" if len(hay.positions) == 1 else f"{len(hay.positions)} keys"
    return f"{hay.tokens:,} tokens with {where}"
