"""Memory on a CPU: 32,768 tokens with a padding mask given, where the mask alone would take a gibibyte as a bool tensor
of N x N."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig

torch.manual_seed(0)
torch.set_num_threads(2)
config = LlamaConfig(
    hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    vocab_size=32, max_position_embeddings=40000,
)
options = {"budget": 0.25, "min_length": 0, "inner": "eager"}
if sys.argv[1] in ("registered", "batched"):
    from stem_compile import register_attention
    register_attention("stem", options=options)
name = "stem" if sys.argv[1] in ("registered", "batched") else "sdpa"
model = AutoModelForCausalLM.from_config(config, attn_implementation=name).eval()
if sys.argv[1] == "stem":
    model = torch.compile(model, backend="stem", options=options, dynamic=False)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def batched(n):
    from transformers import GenerationConfig
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    done = model.generate_batch(
        [torch.randint(0, 32, (n,)).tolist()], GenerationConfig(max_new_tokens=1, do_sample=False, eos_token_id=-1),
        ContinuousBatchingConfig(num_blocks=2100, page_size=16, max_batch_tokens=n, auto_switch_to_flash=False),
        progress_bar=False,
    )
    assert all(len(one.generated_tokens) == 1 for one in done.values()) and len(done) == 1, done
    return torch.zeros(1)

def run(n):
    if sys.argv[1] in ("batched", "batched sdpa"):
        return batched(n)
    mask = torch.ones(1, n, dtype=torch.long)
    mask[:, : n // 10] = 0
    with torch.no_grad():
        return model(torch.randint(0, 32, (1, n)), attention_mask=mask, use_cache=False, logits_to_keep=1).logits

run(600)
before = peak()
out = run(32768)
assert out.isfinite().all()
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("way", "needs_the_mask"), [("stem", False), ("registered", False), ("batched", False), ("eager", True)]
)
def test_peak_memory_beside_one_mask(way: str, needs_the_mask: bool) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    grown = int(done.stdout.split()[-1])
    print(f"{way}: peak grew by {grown / 2**20:.0f} MiB")
    assert (grown > 32768**2) == needs_the_mask, f"{grown / 2**20:.0f} MiB"
