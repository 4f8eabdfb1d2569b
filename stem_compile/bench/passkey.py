"""Pass keys: numbers hidden in a text that a model is asked for at its end."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stem_compile.packages import UserError

KEY = "71432"
NEEDLE = "\n\nThe pass key is {key}. Remember it: {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is "
NAMES = ("red", "blue", "green", "black")
KEYS = ("71432", "58206", "93518", "26947")
NAMED_NEEDLE = "\n\nThe {name} pass key is {key}. Remember it: {key} is the {name} pass key.\n\n"
NAMED_QUESTION = "\n\nWhat is the {name} pass key? The {name} pass key is "


@dataclass(frozen=True)
class Prompt:
    """ids: the tokens up to where the answer starts. answer: the tokens of the pass key. needle: where the key is
    hidden."""

    ids: list[int]
    answer: list[int]
    needle: int


def documentation() -> str:
    """The language reference behind ``help()``, topics in alphabetical order: about 465,000 characters."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def prompt(tokenizer: Any, tokens: int, key: str = KEY, position: float = 0.5) -> Prompt:
    """A prompt of exactly ``tokens`` tokens with ``key`` hidden at ``position`` (0 start, 1 end). Raises UserError for
    too few or too many."""
    needle, question, answer = (tokenizer(part).input_ids for part in (NEEDLE.format(key=key), QUESTION, key))
    room = tokens - len(needle) - len(question)
    if room < 128:
        raise UserError(f"{tokens} tokens leave no room for a text; give at least {tokens - room + 128}")
    text = tokenizer(documentation()).input_ids
    if len(text) < room:
        raise UserError(f"the documentation has {len(text)} tokens; ask for at most {tokens - room + len(text)}")
    before = int(room * position)
    return Prompt([*text[:before], *needle, *text[before:room], *question], answer, before)


@dataclass(frozen=True)
class Haystack:
    """A text with keys in it and one question for each. ids: the tokens of the text. positions: where each key is
    hidden, 0 start, 1 end. questions, answers: tokens, one of each a key."""

    ids: list[int]
    positions: tuple[float, ...]
    questions: list[list[int]]
    answers: list[list[int]]

    @property
    def tokens(self) -> int:
        """Tokens of the longest prompt: the text and a question."""
        return len(self.ids) + max(map(len, self.questions))


def haystack(tokenizer: Any, tokens: int, positions: Sequence[float]) -> Haystack:
    """A prompt of at most ``tokens`` tokens with a key at each of ``positions``, ascending: one key as in the demo, or
    up to four with names. Raises UserError for too few or too many tokens."""
    if len(positions) == 1:
        parts, questions = [NEEDLE.format(key=KEYS[0])], [QUESTION]
    else:
        parts = [NAMED_NEEDLE.format(name=n, key=k) for n, k in zip(NAMES, KEYS)][: len(positions)]
        questions = [NAMED_QUESTION.format(name=n) for n in NAMES][: len(positions)]
    needles = [tokenizer(part).input_ids for part in parts]
    asked = [tokenizer(question).input_ids for question in questions]
    room = tokens - sum(map(len, needles)) - max(map(len, asked))
    if room < 128:
        raise UserError(f"{tokens} tokens leave no room for a text; give at least {tokens - room + 128}")
    text = tokenizer(documentation()).input_ids
    if len(text) < room:
        raise UserError(f"the documentation has {len(text)} tokens; ask for at most {tokens - room + len(text)}")
    ids, start = [], 0
    for position, needle in zip(positions, needles):
        ids += [*text[start : int(room * position)], *needle]
        start = int(room * position)
    answers = [tokenizer(key).input_ids for key in KEYS[: len(positions)]]
    return Haystack([*ids, *text[start:room]], tuple(positions), asked, answers)


@torch.inference_mode()
def answered(model: Any, hay: Haystack, cache: Any) -> list[bool]:
    """Whether the plain ``model`` answers each question on the cache of a prefill of ``hay.ids``, which stays as it is
    for all but the last."""
    device, out = next(model.parameters()).device, []
    for number, (question, answer) in enumerate(zip(hay.questions, hay.answers), 1):
        # A cache of sliding windows cannot be cut back to the text, so each question but the last gets a copy.
        mine = cache if number == len(hay.questions) else copy.deepcopy(cache)
        fed, said = torch.tensor([question], device=device), list[int]()
        while len(said) < len(answer) and (not said or said[-1] == answer[len(said) - 1]):
            logits = model(input_ids=fed, past_key_values=mine, use_cache=True).logits
            said.append(int(logits[0, -1].argmax()))
            fed = torch.tensor([said[-1:]], device=device)
        out.append(said == answer)
    return out
