"""The demo's race: every contender prefills the same prompt in one process, in turns, and is scored on the outputs that
were timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stem_compile.bench.measure import Predictions, Prefill, Run, greedy, predictions, run
from stem_compile.demo.text import Prompt
from stem_compile.selection import Observed, observe


@dataclass(frozen=True)
class Contender:
    """A name for the table and how to compile: no ``backend`` is eager."""

    name: str
    backend: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def compile(self, module: torch.nn.Module) -> Callable[..., Any]:
        """``module``, compiled as this contender does."""
        if self.backend is None:
            return module
        return torch.compile(module, backend=self.backend, options=self.options or None, fullgraph=True)


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
    return [Contender("eager"), Contender("inductor", "inductor"), *stem]


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


@dataclass(frozen=True)
class Stage:
    """Progress: what is happening, and how many of ``total`` steps are done."""

    what: str
    done: int
    total: int


def race(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    entered: Sequence[Contender],
    repeats: int,
    device: str,
    tell: Callable[[Stage], None] = lambda stage: None,
) -> list[Result]:
    """Run all contenders ``repeats`` times in turns. The first call of each (compilation, warm-up) is not timed, but it
    is what is scored."""
    ids = torch.tensor([prompt.ids], device=device)
    prefill = Prefill(model).eval()
    functions = [c.compile(prefill) for c in entered]
    results = [Result(c.name) for c in entered]
    total, done = len(entered) * (1 + repeats), 0
    reference: Predictions | None = None
    for contender, function, result in zip(entered, functions, results, strict=True):
        tell(
            Stage(
                f"{contender.name}: compiling and first run" if contender.backend else f"{contender.name}: first run",
                done,
                total,
            )
        )
        selections: list[Observed] = []
        with observe(selections.append):
            first = run(device, function, ids)
        result.compile_seconds = first.seconds
        scored = _score(result, first, model, tokenizer, prompt, ids, selections, reference)
        reference = reference or scored
        done += 1
        del first, selections
    for turn in range(repeats):
        for contender, function, result in zip(entered, functions, results, strict=True):
            tell(Stage(f"{contender.name}: run {turn + 1} of {repeats}", done, total))
            timed = run(device, function, ids)
            result.seconds.append(timed.seconds)
            if timed.peak_bytes is not None:
                result.peak_bytes = max(result.peak_bytes or 0, timed.peak_bytes)
            done += 1
            del timed
    for result in results:
        result.compile_seconds = max(result.compile_seconds - result.time, 0.0)
    tell(Stage("done", total, total))
    return results


def _score(
    result: Result,
    first: Run,
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
    result.density = (sum(made.density for made in selections) + attentions - len(selections)) / attentions
    answer = greedy(model, logits, cache, len(prompt.answer))
    result.answer = tokenizer.decode(answer)
    result.passkey_found = answer == prompt.answer
    return mine
