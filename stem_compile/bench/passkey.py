"""The demo's prompt: documentation that every Python ships with, one pass key hidden in it, and the question at the
end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stem_compile.packages import UserError

KEY = "71432"
NEEDLE = "\n\nThe pass key is {key}. Remember it: {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is "


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
