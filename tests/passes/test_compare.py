"""A mask or score that was misread is found at compile time, by comparing it with the graph on small examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F

from stem_compile.algebra import masks
from stem_compile.algebra.masks import And, Causal
from stem_compile.algebra.scores import Score
from stem_compile.algebra.symbolic import KV, SCORE, Q
from stem_compile.passes import analyze_masks, compare, pipeline
from stem_compile.passes.graph.sites import AttentionSite
from stem_compile.reasons import Reason
from tests.numerics import assert_close
from tests.passes.capture import rewritten

N = 70


def masked(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(x.shape[2])
    visible = (rows[None, :] <= rows[:, None]) & padding[:, None, None, :].bool()
    return F.scaled_dot_product_attention(x, x, x, attn_mask=visible)


def added(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(x.shape[2])
    hidden = (rows[None, :] > rows[:, None]) | ~padding[:, None, None, :].bool()
    return F.scaled_dot_product_attention(x, x, x, attn_mask=torch.zeros(hidden.shape).masked_fill(hidden, -1e9))


def by_hand(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    rows = torch.arange(x.shape[2])
    hidden = (rows[None, :] > rows[:, None]) | ~padding[:, None, None, :].bool()
    scores = (x @ x.transpose(-1, -2) / 4 + 0.01 * (rows[None, :] - rows[:, None])).masked_fill(hidden, -1e9)
    return torch.softmax(scores, -1) @ x


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    padding = torch.ones(2, N, dtype=torch.int64)
    padding[1, :9] = 0
    return torch.randn(2, 3, N, 16, generator=generator), padding


def without_padding(site: AttentionSite) -> None:
    assert isinstance(site.mask, And)
    site.mask = site.mask.terms[0]


def see_one_more(site: AttentionSite) -> None:
    assert site.mask is not None
    site.mask = masks.predicate(site.mask.predicate.subs(Q, Q + 1))


def window(site: AttentionSite) -> None:
    assert site.mask is not None
    site.mask = site.mask & masks.predicate(sympy.Ge(KV, Q - 30))


def other_scale(site: AttentionSite) -> None:
    site.scale *= 1.5


def steeper(site: AttentionSite) -> None:
    site.score = Score(site.score.expr + (KV - Q) / 50)


def quotient_of_nothing(site: AttentionSite) -> None:
    site.score = Score(SCORE / (Q - KV))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    ("function", "misread"),
    [(f, m) for f in (masked, added, by_hand) for m in (without_padding, see_one_more, window)]
    + [(f, m) for f in (added, by_hand) for m in (steeper, quotient_of_nothing)]
    + [(by_hand, other_scale)],
    ids=lambda f: f.__name__,
)
def test_what_was_misread_is_refused(
    function: Callable[..., Any],
    misread: Callable[[AttentionSite], None],
    dynamic: bool | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = analyze_masks._read

    def wrong(site: AttentionSite, interpreter: Any) -> None:
        right(site, interpreter)
        misread(site)

    monkeypatch.setattr(analyze_masks, "_read", wrong)
    rewrite, out = rewritten(function, inputs(), dynamic=dynamic)
    assert [hit.reason for hit in rewrite.rejected] == [Reason.UNPROVEN]
    assert_close(out, function(*inputs()))


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("function", [masked, added, by_hand])
def test_what_was_read_right_is_rewritten(function: Callable[..., Any], dynamic: bool | None) -> None:
    rewrite, _ = rewritten(function, inputs(), dynamic=dynamic)
    assert len(rewrite.sites) == 1


def test_what_text_cannot_carry_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks travel as text; one whose text says something else never reaches a kernel."""
    monkeypatch.setattr(masks, "encode", lambda mask: str(Causal(1).predicate))
    rewrite, _ = rewritten(masked, inputs())
    assert [hit.reason for hit in rewrite.rejected] == [Reason.UNPROVEN]


def test_bounds_that_lose_keys_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = compare.blocks.candidates
    monkeypatch.setattr(compare.blocks, "candidates", lambda *args: right(*args) & (torch.arange(3) != 1))
    rewrite, _ = rewritten(masked, inputs())
    assert [hit.reason for hit in rewrite.rejected] == [Reason.UNPROVEN]


def test_equal_layers_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[AttentionSite] = []
    right = compare._agree
    monkeypatch.setattr(compare, "_agree", lambda site, example: (asked.append(site), right(site, example)))

    def model(x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = by_hand(x, padding)
        return x

    rewrite, _ = rewritten(model, inputs())
    assert len(rewrite.sites) == 4
    assert len({id(site) for site in asked}) == 1


def test_comparing_leaves_the_users_random_numbers_alone() -> None:
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    rewritten(by_hand, inputs())
    assert torch.equal(torch.rand(3), wanted)
    assert pipeline.compare is compare.compare


def test_what_fails_when_it_is_tried_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare.trial, "failure", lambda *_: "planted")
    rewrite, out = rewritten(masked, inputs())
    assert [(h.reason, h.detail) for h in rewrite.rejected] == [(Reason.UNPROVEN, "fails when it is tried: planted")]
    assert_close(out, masked(*inputs()))


def test_a_function_outside_the_table_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    right = analyze_masks._read

    def outside(site: AttentionSite, interpreter: Any) -> None:
        right(site, interpreter)
        site.score = Score(SCORE + sympy.sin(Q - KV))

    monkeypatch.setattr(analyze_masks, "_read", outside)
    rewrite, out = rewritten(by_hand, inputs())
    assert ["sin in sin(kv - q)" in h.detail for h in rewrite.rejected] == [True]
    assert_close(out, by_hand(*inputs()))
