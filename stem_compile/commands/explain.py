"""``stem-compile explain``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from stem_compile.commands.arguments import add_json, add_target, add_tokens, backend_options, place
from stem_compile.packages import need

HELP = "every attention of a model: what its mask means, whether it is rewritten, and if not, why"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    add_target(parser)
    add_tokens(parser, "8192, or what the model has positions for")
    parser.add_argument("--graphs", metavar="DIR", help="write the graph after each pass into this folder")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Load, run once, print."""
    need("torch")
    import torch

    from stem_compile.bench.target import load
    from stem_compile.explanation import explain

    device, dtype = place(arguments)
    options = backend_options(arguments.option)
    target = load(arguments.target, device, dtype)
    tokens = arguments.tokens or min(8192, target.longest)
    args, kwargs = target.inputs(tokens)
    try:
        with torch.inference_mode():
            explanation = explain(target.model, options, graphs=arguments.graphs)(*args, **kwargs)
    except Exception as error:
        if (own := target.explain_failure(tokens, error)) is not None:
            raise own from error
        raise
    if remark := forced(options, tokens):
        explanation.notes.append(remark)
    print(json.dumps(explanation.to_dict(), indent=2) if arguments.json else explanation)
    return 0


def forced(options: Mapping[str, Any], tokens: int) -> str:
    """Why a causal prompt of ``tokens`` tokens computes more than its budget, and from which length on it does not;
    empty where the budget is kept."""
    from stem_compile.config import StemConfig
    from stem_compile.selection.density import TOLERANCE, causal_density, kept_from

    spec = StemConfig.from_options(options).selection
    if (
        spec.budget is None
        or spec.coverage is not None
        or causal_density(spec, tokens) <= (1 + TOLERANCE) * spec.budget
    ):
        return ""
    start = kept_from(spec)
    promise = f"the budget is kept from {start:,} tokens on" if start else "the budget is kept at no length"
    return (
        f"budget {spec.budget:g}: {causal_density(spec, tokens):.0%} of a causal prompt of {tokens:,} tokens is"
        f" computed, since the first {spec.sinks} and last {spec.locals} key blocks of a row and all of the"
        f" last rows always are; {promise}"
    )
