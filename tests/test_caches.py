"""Caches between processes: a warm start, artifacts moved to another folder, a compiled function saved and loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

MODEL = """
import json, sys
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(64, 192)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (4, 16)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


torch.manual_seed(0)
model, x = Model().eval(), torch.randn(2, 500, 64)
options = {"budget": 0.5, "min_length": 1, "block_size": 64, "key_block_size": 32, "sink_blocks": 1, "local_blocks": 1}


def told(output):
    hits = {k: v for c in ("inductor", "aot_autograd") for k, v in counters[c].items() if "cache" in k}
    print(json.dumps({"sum": float(output.double().sum()), "hits": hits}))

"""
RUN = "with torch.no_grad():\n    told(torch.compile(model, backend='stem', options=options)(x))\n"
DENSE = "with torch.no_grad():\n    told(model(x))\n"


def process(code: str, folder: Path) -> Any:
    """What a process of its own says, with Inductor's caches in ``folder``."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", MODEL + textwrap.dedent(code)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else None


@pytest.fixture(scope="module")
def cold(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(folder, what the first process said); its artifacts are in the folder too."""
    folder = tmp_path_factory.mktemp("caches")
    save = f"open({str(folder / 'artifacts')!r}, 'wb').write(torch.compiler.save_cache_artifacts()[0])\n"
    return folder, process(RUN + save, folder / "inductor")


def test_a_warm_start_hits_and_computes_the_same(cold: tuple[Path, Any]) -> None:
    folder, first = cold
    assert first["hits"]["fxgraph_cache_miss"] == 1
    warm = process(RUN, folder / "inductor")
    assert warm["sum"] == first["sum"]
    assert warm["hits"] == {"fxgraph_cache_hit": 1, "autograd_cache_hit": 1}
    # Sparse, so not what the model itself gives.
    assert process(DENSE, folder / "inductor")["sum"] != first["sum"]


def test_another_option_is_no_hit(cold: tuple[Path, Any]) -> None:
    folder, first = cold
    other = process(RUN.replace("options=options", "options=options | {'budget': 0.9}"), folder / "inductor")
    assert other["hits"].get("fxgraph_cache_hit", 0) == 0
    assert other["sum"] != first["sum"]


def test_artifacts_move_to_another_folder(cold: tuple[Path, Any], tmp_path: Path) -> None:
    folder, first = cold
    load = f"torch.compiler.load_cache_artifacts(open({str(folder / 'artifacts')!r}, 'rb').read())\n"
    moved = process(load + RUN, tmp_path / "elsewhere")
    assert moved["sum"] == first["sum"]
    assert moved["hits"] == {"fxgraph_cache_hit": 1, "autograd_cache_hit": 1}


def test_a_function_compiled_ahead_of_time_comes_back(cold: tuple[Path, Any], tmp_path: Path) -> None:
    _, first = cold
    file = str(tmp_path / "compiled")
    save = f"""
    with torch.no_grad():
        compiled = torch.compile(model, backend="stem", options=options, fullgraph=True)
        compiled.forward.aot_compile(((x,), {{}})).save_compiled_function({file!r})
    """
    process(save, tmp_path / "first")
    load = f"""
    import stem_compile.backend
    with torch.no_grad():
        told(torch.compiler.load_compiled_function(open({file!r}, "rb"))(model, x))
    """
    assert process(load, tmp_path / "second")["sum"] == first["sum"]
