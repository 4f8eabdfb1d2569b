"""The pass-key prompt is what it says."""

from __future__ import annotations

import pytest

from stem_compile.bench.passkey import KEY, NEEDLE, QUESTION, documentation, prompt
from stem_compile.packages import UserError
from tests.tiny import Characters


@pytest.mark.parametrize("tokens", [1000, 8191])
@pytest.mark.parametrize("position", [0.0, 0.5, 1.0])
def test_prompt_has_the_length_the_needle_and_the_question(tokens: int, position: float) -> None:
    written = prompt(Characters(), tokens, position=position)
    text = Characters().decode(written.ids)
    assert len(text) == tokens
    assert text.endswith(QUESTION)
    assert text.count(NEEDLE.format(key=KEY)) == 1
    assert text.index(NEEDLE.format(key=KEY)) == written.needle
    assert Characters().decode(written.answer) == KEY
    assert KEY not in documentation()


def test_prompt_refuses_lengths_it_cannot_have() -> None:
    with pytest.raises(UserError, match="give at least"):
        prompt(Characters(), 100)
    with pytest.raises(UserError, match="ask for at most"):
        prompt(Characters(), 10**7)
