"""docs/life.md shows one attention after every pass: what it shows is what the pipeline does."""

from __future__ import annotations

import inspect
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from stem_compile.algebra import masks
from stem_compile.config import StemConfig
from stem_compile.kernels.spec import KernelSpec
from stem_compile.kernels.triton import codegen
from stem_compile.passes import pipeline
from stem_compile.passes.graph.sites import AttentionSite
from tests.passes.capture import graph_of

PAGE = Path(__file__).parents[2] / "docs" / "life.md"
WIDTH = 112
FRAME = re.compile(r"<!-- generated: (\w+) -->\n```(\w+)\n(.*?)```", re.DOTALL)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    position = torch.arange(q.shape[2], device=q.device)
    mask = (position[None, :] <= position[:, None]) & keep[:, None, None, :]
    scores = (q @ k.transpose(-1, -2)) * 0.25
    scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def printed(graph: fx.Graph) -> str:
    """The graph as Python: one node a line, without the statements that free memory."""
    source = graph.python_code("self").src
    lines = [re.sub(r";  .*= None$", "", line).rstrip() for line in source.splitlines()]
    code = textwrap.dedent("\n".join(line for line in lines if line)).strip()
    return "\n".join(broken(line) for line in code.splitlines()) + "\n"


def broken(line: str) -> str:
    """A line that is too wide for a page, broken between arguments but not inside of texts."""
    first, *rest = re.split(r"(?<=,) (?=(?:[^']*'[^']*')*[^']*$)", line)
    rows = [first]
    for part in rest:
        if len(rows[-1]) + len(part) < WIDTH:
            rows[-1] += f" {part}"
        else:
            rows.append(" " * 8 + part)
    return "\n".join(rows)


def described(site: AttentionSite, *names: str) -> str:
    """Fields of a site, one a line."""
    return "".join(f"{name:8} = {getattr(site, name)}\n" for name in names)


@pytest.fixture(scope="module")
def frames() -> dict[str, str]:
    """What the page's frames hold, from one run of the pipeline."""
    inputs = (*(torch.randn(2, 4, 300, 16) for _ in range(3)), torch.ones(2, 300, dtype=torch.bool))
    module = graph_of(attention, inputs)
    shown = {"model": inspect.getsource(attention), "dynamo": printed(module.graph)}
    sites: list[AttentionSite] = []

    def recorded(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            result = step(*args)
            if name == "match":
                sites.extend(result)
                shown[name] = described(result[0], "node", "q", "k", "v", "product", "logits")
            elif name == "analyze_masks":
                (site,) = result
                shown[name] = described(site, "words", "tensors", "scale") + f"mask     = {masks.encode(site.mask)}\n"
            else:
                shown[name] = printed(module.graph)
            return result

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in ("match", "analyze_masks", "insert_selection", "lower", "cleanup"):
            patch.setattr(pipeline, name, recorded(name, getattr(pipeline, name)))
        pipeline.run(module, StemConfig(budget=0.25, min_length=0, verify=True))
    spec = KernelSpec("portable", "fp32", 16, 16, mask=masks.encode(sites[0].mask))
    source = codegen.generate(spec)
    shown["kernel"] = source.partition(codegen.BEGIN + "\n")[2].partition(codegen.END)[0].strip() + "\n"
    return shown


def test_the_page_shows_what_the_pipeline_does(frames: dict[str, str]) -> None:
    page = PAGE.read_text()
    if os.environ.get("STEM_COMPILE_WRITE_DOCS"):
        page = FRAME.sub(lambda f: f"<!-- generated: {f[1]} -->\n```{f[2]}\n{frames[f[1]]}```", page)
        PAGE.write_text(page)
    assert {frame[1]: frame[3] for frame in FRAME.finditer(page)} == frames


def test_every_pass_is_on_the_page() -> None:
    steps = re.findall(r"^from stem_compile\.passes\.(\w+) import", inspect.getsource(pipeline), re.MULTILINE)
    page = PAGE.read_text()
    assert steps
    assert all(f"`{step}`" in page or f"## {step}\n" in page for step in steps if step != "verify")
