"""The commands of ``stem-compile``. Everything heavy is imported inside them, so that ``--help`` is quick."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from stem_compile.bench.packages import Mendable

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Block-sparse prefill for any model: torch.compile(model, backend='stem').",
)

TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help=(
            "A transformers id or folder, a .gguf file, or package.module:factory, where factory() gives a model with a"
            " transformers config and factory(tokens) gives (model, args)."
        ),
    ),
]
Device = Annotated[str, typer.Option(help="Where to run; a GPU where there is one.", show_default="cuda or cpu")]
Dtype = Annotated[
    str, typer.Option(help="float32, bfloat16 or float16.", show_default="bfloat16 on a GPU, float32 on a CPU")
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-o", metavar="NAME=VALUE", help="Option of the backend, such as budget=0.25; may be repeated."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(help="Length of the prompt.", min=512)] = 8192,
    budget: Annotated[
        list[float] | None,
        typer.Option(help="Part of the attention to compute; may be repeated.", show_default="0.5 and 0.25"),
    ] = None,
    repeats: Annotated[
        int, typer.Option(help="Timed runs of each contender.", show_default="2 on a CPU, 10 on a GPU", min=0)
    ] = 0,
    device: Device = "",
    dtype: Dtype = "",
    option: Options = None,
    out: Annotated[Path, typer.Option(help="Folder for the chart and the JSON file.")] = Path("out"),
    as_json: AsJson = False,
) -> None:
    """SmolLM2-135M reads documentation with a hidden pass key: eager, Inductor and Stem side by side, in speed, memory
    and quality."""
    from stem_compile.bench.packages import need

    need("torch", "matplotlib")
    from stem_compile.bench import machine
    from stem_compile.bench.target import smollm
    from stem_compile.demo import chart
    from stem_compile.demo.race import Stage, contenders, race
    from stem_compile.demo.report import Report
    from stem_compile.demo.text import prompt

    place, precision = _place(device, dtype)
    repeats = repeats or (2 if place.startswith("cpu") else 10)
    further = backend_options(option)
    budgets = budget or [0.5, 0.25]
    backend_options([f"budget={part}" for part in budgets])
    entered = contenders(budgets, further)
    _writable(out, "--out")
    with _progress() as bar:
        task = bar.add_task("loading SmolLM2-135M-Instruct", total=None)
        model, tokenizer = smollm(place, precision)
        written = prompt(tokenizer, tokens)

        def tell(stage: Stage) -> None:
            bar.update(task, description=stage.what, completed=stage.done, total=stage.total)

        results = race(model, tokenizer, written, entered, repeats, place, tell)
    settings = {
        "model": "SmolLM2-135M-Instruct",
        "tokens": tokens,
        "dtype": str(precision).removeprefix("torch."),
        "device": place,
        "machine": machine.describe(place),
        "repeats": repeats,
        "options": further,
    }
    report = Report(settings, results)
    report.write(out / "demo.json")
    (out / "demo.md").write_text(f"{report.markdown()}\n\n{report.caption}\n")
    chart.draw(report, out / "demo.png")
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
        return
    console = Console()
    console.print(report.table())
    console.print(f"Chart: {out / 'demo.png'}   numbers: {out / 'demo.json'}")


@app.command()
def explain(
    target: TargetArgument,
    tokens: Annotated[int, typer.Option(help="Length of the prompt to trace and run.", min=1)] = 8192,
    option: Options = None,
    device: Device = "",
    dtype: Dtype = "",
    as_json: AsJson = False,
) -> None:
    """Show every attention of a model: what its mask means, whether it is rewritten, and if not, why."""
    import torch

    from stem_compile.bench.target import load
    from stem_compile.explanation import explain as explained

    place, precision = _place(device, dtype)
    further = backend_options(option)
    chosen = load(target, place, precision)
    args, kwargs = chosen.inputs(tokens)
    with torch.inference_mode():
        explanation = explained(chosen.model, further)(*args, **kwargs)
    typer.echo(json.dumps(explanation.to_dict(), indent=2) if as_json else str(explanation))


@app.command()
def bench(
    target: TargetArgument,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Prompt length; may be repeated.", show_default="2048, 4096, 8192")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed runs of each contender at each length.", min=1)] = 3,
    option: Options = None,
    device: Device = "",
    dtype: Dtype = "",
    as_json: AsJson = False,
) -> None:
    """Time a model's prefill over prompt lengths: eager, Inductor and Stem."""
    from stem_compile.bench import machine
    from stem_compile.bench import speed as benchmark
    from stem_compile.bench.target import load

    place, precision = _place(device, dtype)
    further = backend_options(option)
    chosen = load(target, place, precision)
    with _progress() as bar:
        task = bar.add_task("starting", total=None)
        rows = list(
            benchmark.bench(
                chosen,
                tokens or [2048, 4096, 8192],
                further,
                repeats,
                place,
                lambda what: bar.update(task, description=what),
            )
        )
    if as_json:
        settings = {
            "target": target,
            "machine": machine.describe(place),
            "dtype": str(precision).removeprefix("torch."),
            "options": further,
        }
        typer.echo(json.dumps({"settings": settings, "rows": [dataclasses.asdict(r) for r in rows]}, indent=2))
        return
    Console().print(benchmark.table(f"{target}, {machine.describe(place)}", rows))


@app.command()
def check(
    target: TargetArgument,
    option: Options = None,
    properties: Annotated[
        list[str] | None,
        typer.Option("--property", "-p", help="Property to check; may be repeated.", show_default="all"),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(help="Examples of each property.", show_default="its own number; 2 for large models", min=1),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Time for all examples but each property's first.",
            show_default="2.5 for large models, else no limit",
            min=0,
        ),
    ] = None,
    expected: Annotated[int | None, typer.Option(help="Attentions that must be rewritten.", show_default="all")] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text for the fidelity report.", show_default="random tokens")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the examples.")] = 0,
    device: Device = "",
    dtype: Dtype = "",
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(help="Also write the report to this file.")] = None,
) -> None:
    """Property-test a model: is it the same as without the backend, and how far off at your budget? Exit status 3
    unless it passes."""
    from stem_compile.testing import command

    place, precision = _place(device, dtype)
    arguments: dict[str, Any] = {
        "options": backend_options(option),
        "properties": properties or None,
        "max_examples": examples,
        "expected": expected,
    }
    arguments |= {"seed": seed, "seconds": None if minutes is None else 60 * minutes}
    if html is not None:
        _writable(html.parent, "--html")
    with _progress() as bar:
        task = bar.add_task("loading", total=None)
        report = command.check(
            target,
            place,
            precision,
            text,
            lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
            **arguments,
        )
    if html is not None:
        report.write(html)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2, default=str))
    else:
        command.show(report, Console())
    raise typer.Exit(0 if report.passed else 3)


def backend_options(pairs: list[str] | None) -> dict[str, Any]:
    """Options of the backend from NAME=VALUE texts. Raises Mendable for a wrong name or value, before anything is
    loaded."""
    from stem_compile.config import OptionError, written_options

    try:
        return written_options(pairs or [])
    except OptionError as error:
        raise Mendable(f"--option {error}") from None


def _place(device: str, dtype: str) -> tuple[str, torch.dtype]:
    import torch

    from stem_compile.bench.target import default_device, default_dtype

    place = device or default_device()
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise Mendable(f"--device {device!r}: {str(error).splitlines()[0]}") from None
    known = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
    if dtype and dtype not in known:
        raise Mendable(f"--dtype {dtype!r}: one of {', '.join(known)}")
    return place, known[dtype] if dtype else default_dtype(place)


def _writable(path: Path, option: str) -> None:
    """Create the folder ``path``. Raises Mendable at once, not after minutes of work whose result has no place."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Mendable(f"{option} {path}: {error.strerror}") from None


def _progress() -> Progress:
    # stderr, so that --json prints nothing but JSON on stdout; as it is now, so that nobody's redirection of it hides
    # the bar.
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(file=sys.stderr), transient=True, refresh_per_second=4)
