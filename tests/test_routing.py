"""Serving: how a step's batch is cut, counted and refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stem_compile.config import OptionError, StemConfig, serving_options
from stem_compile.reasons import Reason
from stem_compile.serving.routing import Metrics, Part, pieces, reason

CONFIG = StemConfig(budget=0.25, min_length=512, block_size=64)


@given(st.integers(1, 3000), st.lists(st.integers(1, 700), min_size=1, max_size=9))
def test_chunks_cover_a_prompt_once_and_are_counted_once(prompt: int, chunks: list[int]) -> None:
    metrics, begin = Metrics(), 0
    while begin < prompt:
        queries = min(chunks[begin % len(chunks)], prompt - begin)
        part = Part(0, 5, queries, begin + queries, prompt)
        metrics.count(part, CONFIG, reason(part, CONFIG))
        cut = list(pieces(part, CONFIG))
        place = part.start
        for piece in cut:
            assert piece.start == place
            assert piece.keys - piece.queries == begin + place - part.start
            if piece.sparse:
                assert (piece.keys - piece.queries) % 64 == 0
                assert piece.keys % 64 == 0 or piece.keys == prompt
            place += piece.queries
        assert place == part.start + queries
        begin += queries
    counted = metrics.as_dict()
    assert sum(counted["tokens"].values()) == prompt
    assert counted["prompts"] == 1
    assert prompt >= 512 or set(counted["tokens"]) == {Reason.SHORT.name}


def test_decoding_is_no_prefill() -> None:
    assert reason(Part(0, 0, 1, 901, 900), CONFIG) is Reason.DECODE


def test_what_failed_is_counted_anew() -> None:
    metrics, part = Metrics(), Part(0, 0, 1000, 1000, 2000)
    metrics.count(part, CONFIG, None)
    metrics.recount([part], CONFIG, Reason.INTERNAL)
    assert metrics.as_dict()["tokens"] == {"INTERNAL": 1000}
    assert metrics.as_dict()["chunks"] == {"INTERNAL": 1}


def test_lengths_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        Part(0, 0, 10, 9, 20)


def test_options_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEM_COMPILE_SERVING", raising=False)
    assert serving_options() is None
    monkeypatch.setenv("STEM_COMPILE_SERVING", "1")
    assert serving_options() == {}
    monkeypatch.setenv("STEM_COMPILE_SERVING", "budget=0.25; min_length=4096")
    assert serving_options() == {"budget": 0.25, "min_length": 4096}
    monkeypatch.setenv("STEM_COMPILE_SERVING", "budgte=0.25")
    with pytest.raises(OptionError, match="budgte"):
        serving_options()
