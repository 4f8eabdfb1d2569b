"""Attention as public repositories write it: equal to eager, rewritten where it is causal, refused for the right reason
where it is not."""

from __future__ import annotations

import pytest
import torch

from stem_compile.passes.graph.sites import Rejected
from tests.numerics import assert_close
from tests.passes.capture import rewritten
from tests.published_modules import (  # noqa: F401
    gpt,
    llama,
    music_and_proteins,
    speech,
    vision_and_diffusion,
    x_transformers,
)
from tests.published_modules.published import PUBLISHED

SHARE = 0.97
"""Of the causal modules, at least so many are rewritten."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_module_is_rewritten_or_refused_and_equal_to_eager(name: str) -> None:
    entry = PUBLISHED[name]
    torch.manual_seed(0)
    module = entry.build().eval().requires_grad_(False)
    inputs = entry.inputs()
    expected = module(*inputs)
    result, out = rewritten(module, inputs)
    assert_close(out, expected)
    reasons = [hit.reason if isinstance(hit, Rejected) else None for hit in result.attentions]
    assert reasons == [entry.reason], [hit.words for hit in result.attentions]


def test_nearly_all_causal_modules_are_rewritten() -> None:
    causal = [entry for entry in PUBLISHED.values() if entry.causal]
    kept = [entry.name for entry in causal if entry.reason is not None]
    assert len(PUBLISHED) >= 60
    assert len(kept) <= (1 - SHARE) * len(causal), kept
