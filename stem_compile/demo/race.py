"""The demo's race: every contender prefills the same prompt in one process, in turns, and is scored on the outputs that
were timed."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stem_compile.bench.contender import RIVALS, Contender
from stem_compile.bench.measure import Measurement, PeakMemory, measured
from stem_compile.bench.passkey import Prompt
from stem_compile.bench.prefill import Predictions, Prefill, greedy, predictions
from stem_compile.bench.terminal import Progress
from stem_compile.bench.units import seconds
from stem_compile.selection import Observed, observe
from stem_compile.timing import in_turns

FINER = {"key_block_size": 64, "stride": 8}
"""Selection of the budgets: key blocks of 64 tokens, scored on groups of 8."""


def contenders(budgets: Sequence[float], options: dict[str, Any]) -> list[Contender]:
    """Eager and Inductor (both dense), Stem at the published length schedule and at each budget. options: Stem's
    further ones.

    A small model on a short prompt has few blocks to choose from, so the budgets choose among finer ones (``FINER``).
    """
    stem = [Contender("stem, published schedule", "stem", options)]
    stem += [
        Contender(f"stem, budget {budget:g}", "stem", {**FINER, **options, "budget": budget}) for budget in budgets
    ]
    return [*RIVALS, *stem]


@dataclass
class Result:
    """What one contender did. The reference of ``nll_change``, ``agreement`` and speed-ups is the first contender.

    seconds: time to first token, each repeat. compile_seconds: the first call beyond that. peak_bytes: memory above the
    model's, most of all repeats. density: computed part of the visible block pairs, mean over attentions. nll: mean
    nats a token. agreement: part of equal top-1.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    compile_seconds: float = 0.0
    peak_bytes: int | None = None
    density: float = 1.0
    nll: float = 0.0
    nll_change: float = 0.0
    agreement: float = 1.0
    answer: str = ""
    passkey_found: bool = False

    @property
    def time(self) -> float:
        """Median seconds to the first token."""
        return statistics.median(self.seconds)


def race(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    entered: Sequence[Contender],
    repeats: int,
    device: str,
    progress: Progress | None = None,
) -> list[Result]:
    """Run all contenders ``repeats`` times in turns. The first call of each (compilation, warm-up) is not timed, but it
    is what is scored. progress: told of every run."""
    progress = progress or Progress(len(entered) * (1 + repeats))
    ids = torch.tensor([prompt.ids], device=device)
    prefill = Prefill(model).eval()
    functions = [c.compile(prefill) for c in entered]
    results = [Result(c.name) for c in entered]
    reference: Predictions | None = None
    for contender, function, result in zip(entered, functions, results, strict=True):
        progress.doing(f"{contender.name}: {'compiling and ' if contender.backend else ''}first run")
        selections: list[Observed] = []
        with observe(selections.append):
            first = measured(device, function, ids)
        result.compile_seconds = first.seconds
        scored = _score(result, first, model, tokenizer, prompt, ids, selections, reference)
        reference = reference or scored
        progress.finished(f"{contender.name}: first run {seconds(first.seconds)}")
        del first, selections
    by_name = {c.name: r for c, r in zip(entered, results, strict=True)}
    memory = PeakMemory(device)

    def before(name: str, turn: int) -> None:
        progress.doing(f"{name}: run {turn + 1} of {repeats}")
        memory.start()

    def after(name: str, milliseconds: float) -> None:
        progress.finished(f"{name}: {seconds(milliseconds / 1e3)}")
        by_name[name].seconds.append(milliseconds / 1e3)
        if (peak := memory.bytes()) is not None:
            by_name[name].peak_bytes = max(by_name[name].peak_bytes or 0, peak)

    with torch.inference_mode():
        calls = {c.name: functools.partial(f, ids) for c, f in zip(entered, functions, strict=True)}
        in_turns(calls, device, turns=repeats, before=before, after=after)
    for result in results:
        result.compile_seconds = max(result.compile_seconds - result.time, 0.0)
    return results


def _score(
    result: Result,
    first: Measurement,
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    ids: torch.Tensor,
    selections: Sequence[Observed],
    reference: Predictions | None,
) -> Predictions:
    logits, hidden, cache = first.output
    mine = predictions(hidden, model.get_output_embeddings(), ids)
    reference = reference or mine
    result.nll = float(mine.nll.mean())
    result.nll_change = float((mine.nll - reference.nll).mean())
    result.agreement = float((mine.top1 == reference.top1).float().mean())
    attentions = model.config.num_hidden_layers
    result.density = (sum(observed.density for observed in selections) + attentions - len(selections)) / attentions
    answer = greedy(model, logits, cache, len(prompt.answer))
    result.answer = tokenizer.decode(answer)
    result.passkey_found = answer == prompt.answer
    return mine
