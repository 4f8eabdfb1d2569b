"""One prompt over several processes: its tokens split, every attention computed over all of them.

    torchrun --nproc-per-node 2 examples/context_parallel.py
    torchrun --nproc-per-node 2 examples/context_parallel.py --balanced
    torchrun --nproc-per-node 4 examples/context_parallel.py --tensor-parallel 2

Small models of four families with random weights, with and without left padding, on CPUs. Each compares the logits with
those of the plain model in one process (dense), the greedy tokens, and the blocks computed at a quarter of the budget
with those of one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from stem_compile.config import StemConfig
from stem_compile.distributed import TokenSplit, balanced, shard, unshard
from stem_compile.selection.observe import observe

LENGTH, PADS, BLOCK = 500, 37, 64
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
}
SPARSE = {"block_size": BLOCK, "sink_blocks": 1, "local_blocks": 1, "share": "group"}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, sliding_window=100, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt-oss": lambda: GptOssConfig(
        **SIZES,
        sliding_window=100,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"],
    ),
}
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROWS = ("o_proj", "down_proj")


def model_of(family: str, experts: str = "grouped_mm") -> torch.nn.Module:
    """The same random model on every rank. experts: how transformers computes a mixture of them ("eager" breaks the
    graph, and alone takes fp64)."""
    torch.manual_seed(0)
    config = FAMILIES[family]()
    config._attn_implementation = "eager" if family == "gpt-oss" else "sdpa"
    if family == "gpt-oss":
        config._experts_implementation = experts
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    return model.eval()


def tensor_parallel(model: torch.nn.Module, mesh: DeviceMesh) -> torch.nn.Module:
    """The model with its projections split over ``mesh``: a rank holds some heads and a part of each MLP."""
    plan: dict[str, Any] = {f"model.layers.*.*.{name}": ColwiseParallel() for name in COLUMNS}
    plan |= {f"model.layers.*.*.{name}": RowwiseParallel() for name in ROWS}
    for module in model.modules():
        if hasattr(module, "sinks"):
            # A logit a head, which no style of parallelize_module splits.
            module.sinks = torch.nn.Parameter(module.sinks.detach().chunk(mesh.size())[mesh.get_local_rank()])
    return parallelize_module(model, mesh, plan)


def prompt(padded: bool) -> dict[str, torch.Tensor]:
    """Two prompts, the second with padding on its left, as arguments of a model."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, SIZES["vocab_size"], (2, LENGTH), generator=generator)
    attention_mask = torch.ones_like(ids)
    attention_mask[1, : PADS * padded] = 0
    return {"input_ids": ids, "position_ids": torch.arange(LENGTH).expand(2, -1), "attention_mask": attention_mask}


def run(model: Any, options: dict[str, Any], given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(logits, blocks computed in each attention, bool [B, H, query blocks, key blocks]) of the compiled model."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="stem", options={"inner": "eager", "min_length": 1, **SPARSE, **options})
    blocks: list[torch.Tensor] = []
    with observe(lambda observed: blocks.append(observed.selection.dense(observed.candidates))), torch.no_grad():
        logits = compiled(**given, use_cache=False).logits
    return logits, blocks


def compare(family: str, padded: bool, tokens: TokenSplit, heads: DeviceMesh | None) -> str:
    """What the ranks make of one model against one process, in a line. Raises AssertionError where they differ."""
    whole, given = model_of(family), prompt(padded)
    part = model_of(family) if heads is None else tensor_parallel(model_of(family), heads)
    mine = shard(tokens, **given, block_size=BLOCK)._asdict()
    real = given["attention_mask"].bool()
    over = {"context_parallel": tokens, "prompt_length": LENGTH}
    with torch.no_grad():
        dense = whole(**given, use_cache=False).logits
        golden = model_of(family, "eager").double()(**given, use_cache=False).logits

    logits = unshard(tokens, run(part, over | {"budget": 1.0}, mine)[0], length=LENGTH)
    error, eager = ((x.double() - golden).abs()[real].max().item() for x in (logits, dense))
    assert error <= 4 * eager + 1e-6, f"{family}: logits differ by {error}, eager's by {eager}"
    assert bool((logits.argmax(-1) == dense.argmax(-1))[real].all()), f"{family}: other greedy tokens"

    alone, wanted = run(whole, {"budget": 0.25, "prompt_length": LENGTH}, given)
    sparse, blocks = run(part, over | {"budget": 0.25}, mine)
    share = compare_blocks(family, blocks, wanted, tokens, heads)
    apart = (unshard(tokens, sparse, length=LENGTH) - alone).abs()[real].max().item()
    assert apart <= 8 * eager + 1e-6, f"{family}: sparse logits differ by {apart}"
    return f"error {error:.1e} (eager {eager:.1e}); at budget 0.25 {share:.0%} of the blocks, all as in one process"


def compare_blocks(
    family: str, blocks: list[torch.Tensor], wanted: list[torch.Tensor], tokens: TokenSplit, heads: DeviceMesh | None
) -> float:
    """Share of the causal blocks that one process computes. Raises AssertionError unless the rank's are the same."""
    rank, chunks = tokens.rank, tokens.held
    assert len(blocks) == len(chunks) * len(wanted)
    for layer, whole in enumerate(wanted):
        if heads is not None:
            whole = whole.chunk(heads.size(), 1)[heads.get_local_rank()]
        for place, chunk in enumerate(chunks):
            mine = blocks[len(chunks) * layer + place]
            rows = whole[:, :, chunk * mine.shape[2] : (chunk + 1) * mine.shape[2]]
            columns = min(mine.shape[3], rows.shape[3])
            same = mine[:, :, : rows.shape[2], :columns] == rows[..., :columns]
            assert bool(same.all()), f"{family}: rank {rank} computes other blocks in attention {layer}, chunk {chunk}"
    return float(torch.cat([w.float().mean((0, 1)).flatten() for w in wanted]).sum()) / sum(
        w.shape[2] * (w.shape[3] + 1) / 2 for w in wanted
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="T", help="ranks that share each token's heads"
    )
    parser.add_argument("--balanced", action="store_true", help="split by the blocks computed at budget 0.25")
    parser.add_argument("--models", nargs="*", default=[*FAMILIES], choices=[*FAMILIES])
    given = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    if size % given.tensor_parallel:
        parser.error(f"--tensor-parallel {given.tensor_parallel} does not divide {size} processes")
    mesh = init_device_mesh(
        "cpu", (size // given.tensor_parallel, given.tensor_parallel), mesh_dim_names=("tokens", "heads")
    )
    selection = StemConfig.from_options({**SPARSE, "budget": 0.25}).selection
    tokens = balanced(mesh["tokens"], selection, LENGTH) if given.balanced else TokenSplit.of(mesh["tokens"])
    heads = mesh["heads"] if given.tensor_parallel > 1 else None
    for family in given.models:
        for padded in (False, True):
            line = compare(family, padded, tokens, heads)
            if dist.get_rank() == 0:
                print(f"{family}{', left padding' if padded else ''}: {line}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
