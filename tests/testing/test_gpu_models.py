"""Every property on models of transformers in bf16 and fp16 on a GPU, with the GPU's kernels.

STEM_COMPILE_TEST_DEVICE=cpu runs the same code on a CPU (choose a few with -k); STEM_COMPILE_REPORTS=folder keeps each
report as JSON. Models are small, so ``pytest -n 12`` shares one GPU.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from stem_compile.testing import check_model
from tests.testing.model_types import TYPES, known, model_of

DEVICE = os.environ.get("STEM_COMPILE_TEST_DEVICE", "cuda")
# The marker is what skips these where there is no GPU, with its reason.
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

NAMES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma",
    "gpt2",
    "gpt_neox",
    "olmo",
    "olmo2",
    "phi",
    "granite",
    "starcoder2",
)
WIDE = {"hidden_size": 256, "head_dim": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
"""Heads as large models have them."""
EXPECTED = (
    "dense-equivalence",
    "kernel-exactness",
    "coverage",
    "block-causality",
    "padding-invariance",
    "batch-invariance",
    "prefix-invariance",
    "budget",
)
"""Must hold; the others may say nothing (a model that is not deterministic by itself)."""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_type_in_half_precision(name: str, dtype: torch.dtype) -> None:
    _check(name, dtype, {}, {})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_large_heads_and_blocks(name: str, dtype: torch.dtype) -> None:
    """Blocks of 128 and head dim 128: what the kernel for Hopper takes."""
    _check(name, dtype, WIDE, {"block_size": 128, "key_block_size": 128, "sink_blocks": 0})


def _check(name: str, dtype: torch.dtype, config: dict[str, Any], options: dict[str, Any]) -> None:
    if not known(name):
        pytest.skip(f"the installed transformers has no type {name!r}")
    report = check_model(
        model_of(name, dtype, DEVICE, **config), options=options, max_examples=2, expected=TYPES[name].sites
    )
    if folder := os.environ.get("STEM_COMPILE_REPORTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        report.write(Path(folder) / f"{name}-{str(dtype).removeprefix('torch.')}{'-wide' if config else ''}.json")
    report.raise_for_failures()
    verdicts = {r.name: r.verdict for r in report.results}
    assert {verdicts[n] for n in EXPECTED} == {"pass"}, report
