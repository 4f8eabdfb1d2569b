"""The house grows without a change to it: what CONTRIBUTING.md adds from outside is registered as documented, drives a
compiled model, and is gone when it is taken away.

Each member is a file in a temporary folder. It comes in by a call of its registry, or by the entry point of an
installed distribution.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stem_compile import explain
from stem_compile.algebra import functions, masks
from stem_compile.config import OptionError, StemConfig
from stem_compile.kernels.contract import TARGETS
from stem_compile.kernels.triton.template import TEMPLATES
from stem_compile.passes.match import PATTERNS
from stem_compile.passes.reading.interpret import unregister_reader
from stem_compile.registry import Registry
from stem_compile.selection.policies import POLICIES
from stem_compile.testing.tolerances import ATTENTION
from tests.guide import files
from tests.numerics import assert_within

ROOT = Path(__file__).parents[1]
ADDITIONS: dict[str, tuple[Registry, str, str]] = {
    "fused_attention": (PATTERNS, "stem_compile.patterns", "acme"),
    "uniform": (POLICIES, "stem_compile.policies", "uniform"),
    "tile_target": (TARGETS, "stem_compile.targets", "toy"),
    "tile_target:TEMPLATE": (TEMPLATES, "stem_compile.templates", "tile_rows"),
}
"""What an entry point refers to -> the registry it goes into, the entry points' group, and its name there."""
WAYS = ("register", "entry point")


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with the modules of the guide; no trace of them afterwards."""
    for name, code in files().items():
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [n for n, m in sys.modules.items() if str(tmp_path) in str(getattr(m, "__file__", ""))]:
        del sys.modules[name]


def install(folder: Path, *references: str) -> None:
    """Make the folder's modules an installed distribution whose entry points are ``references``."""
    info = folder / "acme-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1\n")
    groups = [f"[{ADDITIONS[r][1]}]\n{ADDITIONS[r][2]} = {r}\n" for r in references]
    (info / "entry_points.txt").write_text("\n".join(groups))
    importlib.invalidate_caches()


@pytest.fixture
def add(outside: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Add a module of the guide in one of the ways; taken away again afterwards."""
    registered: list[tuple[Registry, str]] = []

    def added(module: str, way: str) -> None:
        registry, _, name = ADDITIONS[module]
        assert name not in registry.names()
        if way == "register":
            registry.register(name, importlib.import_module(module))
            registered.append((registry, name))
        else:
            install(outside, module)
            monkeypatch.setattr(sys, "path", [*sys.path, str(outside)])  # distributions are looked for on a new path

    yield added
    for registry, name in registered:
        registry.unregister(name)


class Layer(torch.nn.Module):
    """One attention layer [B, n, 64] -> [B, n, 64] around ``attend`` of q, k, v [B, 4, n, 16]."""

    def __init__(self, attend: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.inner, self.outer = torch.nn.Linear(64, 192), torch.nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in self.inner(x).chunk(3, -1))
        return self.outer(self.attend(q, k, v).transpose(1, 2).flatten(2))


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def model(attend: Callable[..., torch.Tensor]) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(Layer(attend), Layer(attend)).eval().requires_grad_(False)


def sites(module: torch.nn.Module, x: torch.Tensor, **options: Any) -> list[dict[str, Any]]:
    return explain(module, {"min_length": 0, "budget": 1.0, **options})(x).to_dict()["sites"]


def assert_equal_to_eager(module: torch.nn.Module, x: torch.Tensor, **options: Any) -> None:
    """The compiled model's output is eager's."""
    compiled = torch.compile(
        module, backend="stem", options={"min_length": 0, "budget": 1.0, "inner": "eager", "verify": True, **options}
    )
    eager = module(x)
    assert_within(compiled(x), module.double()(x.double()), eager)
    module.float()


@pytest.mark.parametrize("way", WAYS)
def test_a_pattern(way: str, add: Callable[[str, str], None]) -> None:
    x = torch.randn(1, 300, 64)
    importlib.import_module("fused_attention")
    module = model(lambda q, k, v: torch.ops.acme.attention(q, k, v, 0.25, True))
    assert sites(module, x) == []
    add("fused_attention", way)
    assert [s["decision"] for s in sites(module, x)] == ["rewritten", "rewritten"]
    assert_equal_to_eager(module, x)


@pytest.mark.parametrize("way", WAYS)
def test_a_policy_with_an_option_of_its_own(way: str, add: Callable[[str, str], None]) -> None:
    x, module = torch.randn(1, 2048, 64), model(causal)
    with pytest.raises(OptionError, match="uniform"):
        StemConfig(policy="uniform")
    add("uniform", way)
    options = {"policy": "uniform", "sink_blocks": 1, "local_blocks": 1}
    density = [sites(module, x, row_blocks=n, **options)[0]["density"] for n in (3, 16)]
    assert density[0] < 0.5
    assert density[1] == 1.0
    assert_equal_to_eager(module, x, row_blocks=16, **options)
    with pytest.raises(OptionError, match="row_blocks=0"):
        StemConfig.from_options({"policy": "uniform", "row_blocks": 0})


def test_a_mask_function(outside: Path) -> None:
    x = torch.randn(1, 300, 64)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        place = torch.arange(q.shape[2], device=q.device)
        distance = place[:, None] - place[None, :]
        far = torch.sign(distance - 40) == 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(far | (distance == 0)) & (distance >= 0))

    assert "given as a tensor" in sites(model(attend), x)[0]["mask"]
    sign = importlib.import_module("sign")
    sign.register()
    try:
        assert "Sign(" in sites(model(attend), x)[0]["mask"]
        assert_equal_to_eager(model(attend), x)
    finally:
        functions.unregister("Sign")
        unregister_reader("sign")
    assert "given as a tensor" in sites(model(attend), x)[0]["mask"]


def test_a_mask_term(outside: Path) -> None:
    x = torch.randn(1, 300, 64)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        place = torch.arange(q.shape[2], device=q.device)
        distance = place[:, None] - place[None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance % 3 == 0) & (distance >= 0))

    dilated = importlib.import_module("dilated").Dilated
    assert "every" not in sites(model(attend), x)[0]["mask"]
    masks.register(dilated)
    try:
        assert sites(model(attend), x)[0]["mask"] == "causal & every 3th key"
        assert_equal_to_eager(model(attend), x)
    finally:
        masks.unregister(dilated)
    assert "every" not in sites(model(attend), x)[0]["mask"]


@pytest.mark.parametrize("way", [*WAYS, "not at all"])
def test_a_device_and_a_template(way: str, outside: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """On a device of the tests' own, which a process keeps for good; hence one for each."""
    if way == "entry point":
        install(outside, "tile_target", "tile_target:TEMPLATE")
    env = os.environ | {"TRITON_INTERPRET": "1", "STEM_COMPILE_CACHE": str(tmp_path_factory.mktemp("cache"))}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tests.growth_on_toy", str(outside), "yes" if way == "register" else "no"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    if way == "not at all":
        assert result["reasons"] == ["device", "device"]
    else:
        assert result["kernels"] == ["tile_rows fp32 d16 64x64"] * 2
    assert result["error"] <= ATTENTION.allowed(result["eager"], result["size"], torch.float32)
