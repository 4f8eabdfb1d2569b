"""What can be added is added by one mechanism: by a file's name, an entry point, or register(); a broken member costs
itself only."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Protocol

import pytest
import sympy
import torch

import stem_compile
from stem_compile import selection
from stem_compile.algebra.symbolic import BLOCKS
from stem_compile.config import OptionError, StemConfig
from stem_compile.kernels import cache, launch
from stem_compile.kernels.contract import TARGETS, Kernels, Stopwatch
from stem_compile.kernels.spec import KernelSpec
from stem_compile.kernels.targets.cpu import target as cpu
from stem_compile.kernels.triton import codegen
from stem_compile.kernels.triton.template import TEMPLATES, TemplateFile
from stem_compile.passes.match import PATTERNS
from stem_compile.reasons import Reason
from stem_compile.registry import Registry, RegistryError, contract_names
from stem_compile.selection import Attention, SelectionSpec, parse
from stem_compile.selection.policies import POLICIES, check
from stem_compile.selection.policy import Option

REGISTRIES: tuple[Registry[Any], ...] = (POLICIES, PATTERNS, TARGETS, TEMPLATES)
MEMBERS = [(registry, name) for registry in REGISTRIES for name in registry.builtin()]


@pytest.mark.parametrize(("registry", "name"), MEMBERS, ids=[f"{r.kind}-{n}" for r, n in MEMBERS])
def test_a_built_in_member_keeps_its_contract(registry: Registry[Any], name: str) -> None:
    member = registry.get(name)
    assert isinstance(member, registry.contract)
    assert member.__doc__
    for part in contract_names(registry.contract):
        wanted = getattr(registry.contract, "__annotations__", {}).get(part)
        assert callable(getattr(member, part)) if wanted is None else isinstance(getattr(member, part), bool)


@pytest.mark.parametrize("name", PATTERNS.builtin())
def test_a_pattern_shows_what_it_finds_and_what_not(name: str) -> None:
    assert PATTERNS.get(name).examples()
    assert PATTERNS.get(name).near_misses()


class Named(Protocol):
    NAME: str


@pytest.fixture
def animals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry[Named]]:
    """A registry with one built-in member, "cat", on a path where tests can install packages."""
    package = tmp_path / "animals_builtin"
    package.mkdir()
    (package / "cat.py").write_text("NAME = 'cat'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Registry("animal", Named, folder=package, package="animals_builtin", group="animals")
    for name in [n for n in sys.modules if n.startswith("animals_")]:
        del sys.modules[name]


def install(folder: Path, name: str, member: str, source: str, distribution: str, monkeypatch: Any) -> None:
    """A package on a path of its own, with one entry point of the group ``animals``."""
    home = folder / distribution
    info = home / f"{distribution}-1.dist-info"
    info.mkdir(parents=True)
    (home / f"{member}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[animals]\n{name} = {member}\n")
    monkeypatch.syspath_prepend(str(home))


def test_names_are_listed_without_an_import(animals: Registry[Named], tmp_path: Path, monkeypatch: Any) -> None:
    install(tmp_path, "dog", "animals_dog", "NAME = 'dog'\n", "kennel", monkeypatch)
    assert animals.names() == ("cat", "dog")
    assert not {"animals_dog", "animals_builtin.cat"} & sys.modules.keys()
    assert animals.get("dog").NAME == "dog"
    assert "animals_dog" in sys.modules


def test_register_and_unregister(animals: Registry[Named]) -> None:
    cow = SimpleNamespace(NAME="cow")
    with animals.register("cow", cow):
        assert animals.get("cow") is cow
        with pytest.raises(RegistryError, match="animal 'cow' is there already"):
            animals.register("cow", cow)
    with pytest.raises(RegistryError, match="unknown animal 'cow'; there are cat"):
        animals.get("cow")
    with pytest.raises(RegistryError, match="'cat' was not added"):
        animals.unregister("cat")
    with pytest.raises(RegistryError, match="animal 'ox' lacks NAME"):
        animals.register("ox", SimpleNamespace())
    with animals.register("cow", cow):
        animals.unregister("cow")
    assert animals.names() == ("cat",)


@pytest.mark.parametrize("source", ["raise OSError('no disk')\n", "OTHER = 1\n", "import no_such_module\n"])
def test_a_broken_entry_point_costs_itself_only(
    animals: Registry[Named], tmp_path: Path, monkeypatch: Any, source: str
) -> None:
    install(tmp_path, "dog", "animals_dog", source, "kennel", monkeypatch)
    with pytest.warns(UserWarning, match=r"animal 'dog' of kennel \(animals_dog\) cannot be used") as caught:
        assert [name for name, _ in animals.members()] == ["cat"]
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [name for name, _ in animals.members()] == ["cat"]  # said once
    assert animals.get("cat").NAME == "cat"
    with pytest.raises(RegistryError, match="animal 'dog' of kennel"):
        animals.get("dog")


def test_one_name_from_two_packages_is_one_error(animals: Registry[Named], tmp_path: Path, monkeypatch: Any) -> None:
    install(tmp_path, "dog", "animals_dog", "NAME = 'dog'\n", "kennel", monkeypatch)
    install(tmp_path, "dog", "animals_wolf", "NAME = 'wolf'\n", "forest", monkeypatch)
    with pytest.raises(
        RegistryError, match=r"forest \(animals_wolf\) and kennel \(animals_dog\); uninstall all but one"
    ):
        animals.get("dog")


def test_a_built_in_name_stays_what_it_is(animals: Registry[Named], tmp_path: Path, monkeypatch: Any) -> None:
    install(tmp_path, "cat", "animals_lion", "NAME = 'lion'\n", "savanna", monkeypatch)
    with pytest.warns(UserWarning, match="animal 'cat' of savanna .* left out: the name is built in"):
        assert [member.NAME for _, member in animals.members()] == ["cat"]
    assert animals.get("cat").NAME == "cat"


def test_answers_of_members_are_forgotten_when_members_change(animals: Registry[Named]) -> None:
    import functools

    @animals.caches
    @functools.cache
    def shout(name: str) -> str:
        return animals.get(name).NAME.upper()

    with animals.register("cow", SimpleNamespace(NAME="cow")):
        assert shout("cow") == "COW"
    with animals.register("cow", SimpleNamespace(NAME="bull")):
        assert shout("cow") == "BULL"


def toy(**changes: Any) -> Any:
    """A policy with options of its own."""
    options = (Option("toy_strength", 2, 1, 9), Option("toy_mode", "slow", choices=("slow", "fast")))
    return SimpleNamespace(
        **{
            "SCORED": True,
            "ANY_ORDER": False,
            "OPTIONS": options,
            "budget": lambda spec: spec.option("toy_strength"),
            "width": lambda spec, key_blocks: spec.option("toy_strength") + spec.sinks + spec.locals,
            "min_length": lambda spec: 0,
            **changes,
        }
    )


def test_a_policy_brings_options_of_its_own() -> None:
    with stem_compile.policies.register("toy", toy()):
        config = StemConfig.from_options({"policy": "toy", "toy_strength": 3, "toy_mode": "fast"})
        assert config.selection.option("toy_strength") == 3
        assert "toy_strength=3" in config.selection.text()
        assert parse(config.selection.text()) == config.selection
        assert SelectionSpec(policy="toy").option("toy_strength") == 2
        # What equals the default is not written: equal specifications have equal text.
        assert StemConfig.from_options({"policy": "toy", "toy_strength": 2}).selection == SelectionSpec(policy="toy")
        for options, message in (
            ({"policy": "toy", "toy_strength": 10}, r"toy_strength=10: an integer in \[1, 9\]"),
            ({"policy": "toy", "toy_strength": 3.0}, "toy_strength=3.0: an integer"),
            ({"policy": "toy", "toy_mode": "fats"}, "did you mean 'fast'"),
            ({"policy": "toy", "toy_strenght": 3}, "did you mean 'toy_strength'"),
            ({"policy": "stem", "toy_strength": 3}, "unknown option 'toy_strength'"),
        ):
            with pytest.raises(OptionError, match=message):
                StemConfig.from_options(options)
    with pytest.raises(OptionError, match="policy='toy' is not one of"):
        StemConfig.from_options({"policy": "toy"})
    with pytest.raises(ValueError, match="unknown policy 'toy'"):
        parse("policy=toy,toy_strength=3")


def test_a_policy_without_a_part_of_its_contract_is_refused() -> None:
    policy = toy()
    del policy.ANY_ORDER
    with pytest.raises(RegistryError, match="policy 'toy' lacks ANY_ORDER"):
        POLICIES.register("toy", policy)


def test_an_option_cannot_shadow_the_backends() -> None:
    with (
        stem_compile.policies.register("toy", toy(OPTIONS=(Option("budget", 1),))),
        pytest.raises(OptionError, match="'budget' has the name of one that is there"),
    ):
        StemConfig(policy="toy")


def test_a_policy_is_asked_everything_before_a_graph_is_touched() -> None:
    for broken, message in (
        (toy(budget=lambda spec: 1 / 0), "division by zero"),
        (toy(budget=lambda spec: 9, width=lambda spec, key_blocks: 3), "but its width is 3"),
        (toy(budget=lambda spec: sympy.Symbol("unknown")), "unknown has no value"),
        (toy(budget=lambda spec: BLOCKS * 0.5), "no whole number"),
        (toy(min_length=lambda spec: -1), "min_length is negative"),
    ):
        with (
            stem_compile.policies.register("toy", broken),
            pytest.raises((ValueError, ZeroDivisionError, KeyError), match=message),
        ):
            check(SelectionSpec(policy="toy"))
    for name in POLICIES.builtin():
        for budget in (None, 0.01, 0.3, 1.0):
            check(SelectionSpec(policy=name, budget=budget))


def test_a_policy_of_ones_own_selects() -> None:
    q = torch.randn(1, 2, 1024, 16)
    options = {"policy": "toy", "toy_strength": 7, "block_size": 64, "sink_blocks": 1, "min_length": 0}
    with (
        stem_compile.policies.register("toy", toy()),
        selection.observe(lambda observed: lists.append(observed.selection)),
    ):
        lists: list[selection.BlockSelection] = []
        attention = lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)  # noqa: E731
        out = torch.compile(attention, backend="stem", options={**options, "inner": "eager"})(q)
    assert out.isfinite().all()
    assert set(lists[0].counts[0, 0].tolist()) == {7, selection.FULL}


def test_a_device_of_ones_own_computes_and_one_without_stays_dense() -> None:
    class Meta:
        """Counts what it is asked."""

        asked: ClassVar[list[str]] = []

        def supports(self, attention: Any) -> Reason | None:
            self.asked.append("supports")
            return Reason.HEAD_DIM if attention.q.shape[-1] == 17 else None

        def kernels(self, attention: Any) -> Kernels:
            return Kernels("toy select", "toy attend")

        def select(self, attention: Any, kernel: str) -> Any:
            self.asked.append(kernel)
            return cpu.select(attention, "")

        def attend(self, attention: Any, lists: Any, kernel: str) -> torch.Tensor:
            self.asked.append(kernel)
            return attention.q * 0

        def stopwatch(self, device: torch.device) -> Stopwatch | None:
            return None

    x = torch.empty(1, 2, 256, 16, device="meta")
    assert launch.refusal(Attention(x, x, x)) is Reason.DEVICE
    with pytest.raises(ValueError, match="no kernels for this device"):
        launch.kernels(Attention(x, x, x))
    with TARGETS.register("meta", Meta()):
        assert launch.refusal(Attention(x, x, x)) is None
        assert launch.kernels(Attention(x, x, x)) == ("toy select", "toy attend")
        narrow = x[..., :1].expand(1, 2, 256, 17)
        assert launch.refusal(Attention(narrow, narrow, narrow)) is Reason.HEAD_DIM
    assert launch.refusal(Attention(x, x, x)) is Reason.DEVICE
    assert Meta.asked == ["supports"] * 3


@pytest.mark.parametrize("source", ["raise OSError('no driver')\n", "HEAD_DIMS = 3\n"])
def test_a_device_whose_target_is_broken_stays_dense(tmp_path: Path, monkeypatch: Any, source: str) -> None:
    home, info = tmp_path / "meta_target", tmp_path / "meta_target" / "meta_target-1.dist-info"
    info.mkdir(parents=True)
    (home / "meta_target_module.py").write_text(source)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: meta-target\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[stem_compile.targets]\nmeta = meta_target_module\n")
    monkeypatch.syspath_prepend(str(home))
    x = torch.empty(1, 2, 256, 16, device="meta")
    launch.target.cache_clear()
    with pytest.warns(UserWarning, match="attention on meta stays dense: target 'meta' of meta-target"):
        assert launch.refusal(Attention(x, x, x)) is Reason.DEVICE
    launch.target.cache_clear()


def test_a_template_of_ones_own_is_generated(tmp_path: Path) -> None:
    path = tmp_path / "toy.py"
    path.write_text(
        "import triton\nimport triton.language as tl\n\n# generated: begin\nHEAD_DIM = tl.constexpr(64)\n"
        "# generated: end\nTWICE = tl.constexpr(2 * HEAD_DIM.value)\n"
    )
    with TEMPLATES.register("toy", TemplateFile(path)):
        source = codegen.generate(KernelSpec("toy", head_dim=96))
    assert "HEAD_DIM = tl.constexpr(96)\n" in source
    assert source.endswith("TWICE = tl.constexpr(2 * HEAD_DIM.value)\n")
    with pytest.raises(RegistryError, match="unknown template 'toy'"):
        codegen.generate(KernelSpec("toy", head_dim=96))


def test_a_generated_module_is_of_the_policy_that_is_registered() -> None:
    pytest.importorskip("triton")
    spec = KernelSpec("select", selection="policy=toy")
    for strength in (2, 3):
        with stem_compile.policies.register("toy", toy(budget=lambda spec, n=strength: n)):
            assert f"return {strength}\n" in Path(str(cache.load(spec).__file__)).read_text()
