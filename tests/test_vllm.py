"""The vLLM plugin on a CPU: ``make vllm``. Without vLLM or SmolLM2 as a folder nothing here runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")
FOLDER = Path(__file__).parents[1] / "out/smollm2"
pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="python tools/save_smollm.py out/smollm2")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def answers(options: dict[str, Any] | None, chunk: int) -> tuple[list[list[int]], dict[str, Any]]:
    from vllm import LLM, SamplingParams

    from stem_compile.bench.passkey import documentation
    from stem_compile.serving.vllm import metrics

    llm = LLM(
        str(FOLDER), dtype="float32", enforce_eager=True, max_model_len=4096, max_num_batched_tokens=chunk,
        enable_prefix_caching=True, additional_config={} if options is None else {"stem": options},
    )  # fmt: skip
    ids = llm.get_tokenizer()(documentation()[:60000]).input_ids
    given = [{"prompt_token_ids": ids[50 * i : 50 * i + n]} for i, n in enumerate((1000, 2500, 3100, 300))]
    out = llm.generate(given, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True), use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in out], metrics(llm)


def test_tokens_are_natives_and_every_prefill_is_counted() -> None:
    expected, _ = answers(None, 4096)
    for chunk in (4096, 1024):
        tokens, counted = answers({"budget": 1.0, "min_length": 512}, chunk)
        assert tokens == expected
        assert counted["prompts"] == 4
        assert sum(counted["tokens"].values()) == 6900
        assert counted["tokens"]["SHORT"] == 300


@pytest.mark.parametrize(("dtype", "isa"), [(torch.float32, "vec"), (torch.bfloat16, "vec")])
def test_a_cache_is_read_and_wrong_tables_are_refused(dtype: torch.dtype, isa: str) -> None:
    from vllm import _custom_ops as custom_ops

    from stem_compile.serving.vllm import read_cache

    keys, values = torch.randn(2, 300, 2, 64).to(dtype)
    cache = torch.zeros(8, 2, 128, 128, dtype=dtype)
    table = torch.tensor([5, 2, 7], dtype=torch.int32)
    slots = (table.long()[:, None] * 128 + torch.arange(128)).flatten()[:300]
    halves = cache.view(8, 2, 256, 64).chunk(2, dim=2)
    custom_ops.cpu_attn_reshape_and_cache(
        keys, values, *halves, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    k, v = read_cache(cache, table, 300, isa)
    assert torch.equal(k, keys)
    assert torch.equal(v, values)
    with pytest.raises(ValueError, match="the table has 2"):
        read_cache(cache, table[:2], 300, isa)
    with pytest.raises(ValueError, match="the cache has 8 blocks"):
        read_cache(cache, torch.tensor([5, 2, 9]), 300, isa)
