"""Time to first token and peak memory of a Llama-3.1-8B shape (random weights): eager, Inductor and stem in one run.

    python benchmarks/prefill.py --layers 4 --tokens 4096 32768 131072

Each contender's last-token logits are held against eager's before it is timed: at ``budget=1.0`` they must agree, at
other budgets the distance is printed. Out of memory is an answer, not a crash.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
from pathlib import Path
from typing import Any

import torch

from stem_compile.timing import in_turns, timed


def build(layers: int, device: str, dtype: torch.dtype) -> Any:
    """Llama-3.1-8B's shape with ``layers`` layers and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=1 << 20,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
    return model


CONTENDERS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "inductor": {"backend": "inductor"},
    "stem": {"backend": "stem"},
    "stem 0.25": {"backend": "stem", "options": {"budget": 0.25}},
    "stem 1.0": {"backend": "stem", "options": {"budget": 1.0}},
}


def _logits(call: Any, inputs: dict[str, Any]) -> torch.Tensor:
    logits: torch.Tensor = call(**inputs).logits
    return logits


def measure(model: Any, tokens: int, names: list[str], seconds: float, with_mask: bool) -> list[dict[str, Any]]:
    """One row a contender at one length."""
    ids = torch.randint(0, 1000, (1, tokens), device="cuda")
    inputs = {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
    if with_mask:
        inputs["attention_mask"] = torch.ones_like(ids)
    rows: list[dict[str, Any]] = []
    reference: torch.Tensor | None = None
    for name in names:
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        how = CONTENDERS[name]
        call = model if how is None else torch.compile(model, dynamic=False, **how)
        row: dict[str, Any] = {"tokens": tokens, "mask": with_mask, "contender": name}
        try:
            first, output = timed(functools.partial(call, **inputs), "cuda")
            row["first_call_s"] = first / 1e3
            logits = output.logits[0, -1].float()
            del output
            reference = logits if reference is None else reference
            row["distance"] = float((logits - reference).norm() / reference.norm())
            if name == "stem 1.0" and not row["distance"] < 0.05:
                raise SystemExit(f"WRONG: {name} at {tokens} tokens differs from {names[0]} by {row['distance']:.3g}")
            torch.cuda.reset_peak_memory_stats()
            timing = in_turns(
                {name: functools.partial(_logits, call, inputs)},
                "cuda",
                turns=3,
                milliseconds=1e3 * seconds,
                most_turns=30,
            )[name]
            row |= {
                "ms": timing.median,
                "low": min(timing.milliseconds),
                "high": max(timing.milliseconds),
                "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            }
        except torch.OutOfMemoryError as error:
            row["failed"] = "out of memory: " + str(error).split(". ")[0][-60:]
        rows.append(row)
        base = next((r["ms"] for r in rows if "ms" in r), None)
        text = (
            row.get("failed")
            or f"{row['ms']:9.1f} ms [{row['low']:.1f}, {row['high']:.1f}]  {base / row['ms']:.2f}x"
            f"  peak {row['peak_gb']:.1f} GB  "
        )
        text += "" if "failed" in row else f"distance {row['distance']:.2e}  first call {row['first_call_s']:.0f} s"
        print(f"{tokens:8d} {'masked' if with_mask else '':7s}{name:10s} {text}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 32768, 131072])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=["eager", "inductor", "stem"])
    parser.add_argument("--seconds", type=float, default=3.0, help="timed seconds a contender and length, at most")
    parser.add_argument("--mask", action="store_true", help="pass an attention mask of ones")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a GPU; `stem-compile bench` runs on a CPU")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.layers} layers, bf16")
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        model = build(arguments.layers, "cuda", torch.bfloat16)
        for tokens in arguments.tokens:
            rows += measure(model, tokens, arguments.contenders, arguments.seconds, arguments.mask)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"device": torch.cuda.get_device_name(), "layers": arguments.layers, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
