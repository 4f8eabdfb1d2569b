"""Options: what is wrong is said at once, with the valid values and the nearest spelling."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch

from stem_compile import selection
from stem_compile.backend import StemError
from stem_compile.config import OptionError, StemConfig


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budgte": 0.3}, ("budgte", "'budget'", "mu")),
        ({"policy": "stm"}, ("'stm'", "'stem'", "'dense'")),
        ({"budget": 0}, ("budget=0", "(0, 1]")),
        ({"budget": 1.5}, ("1.5",)),
        ({"budget": True}, ("True",)),
        ({"block_size": 100}, ("100", "64", "128")),
        ({"inner": "inductr"}, ("'inductor'",)),
        ({"local_blocks": 0}, ("local_blocks=0", "at least 1")),
        ({"dense_layers": -1}, ("dense_layers=-1",)),
        ({"mu": "high"}, ("mu='high'", "[0, 1]")),
        ({"min_length": 1.5}, ("min_length=1.5",)),
        ({"block_size": 64.0}, ("block_size=64.0", "64, 128")),
        ({"stride": "16"}, ("stride='16'", "did you mean 16?")),
        ("budget=0.25", ("options='budget=0.25'", "a dict of options")),
        (0.25, ("options=0.25", "StemConfig")),
        ({"xyzzy": 1}, ("unknown option 'xyzzy'. Options: policy, budget",)),
    ],
)
def test_wrong_options_name_the_way_out(options: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(OptionError) as error:
        StemConfig.from_options(options)
    for word in words:
        assert word in str(error.value)


def test_a_typo_reaches_the_user_of_torch_compile() -> None:
    with pytest.raises(ValueError, match="did you mean 'budget'"):
        torch.compile(torch.nn.Linear(2, 2), backend="stem", options={"budgte": 0.3})(torch.ones(2))


@pytest.mark.parametrize("given", [{"mode": "fast"}, {"options": {"mode": "fast"}}])
def test_a_wrong_mode_is_said_wherever_it_is_given(given: dict[str, Any]) -> None:
    with pytest.raises(StemError, match="mode='fast' is not one of 'default'"):
        torch.compile(torch.nn.Linear(2, 2), backend="stem", **given)(torch.ones(2))


def test_a_config_serves_as_options_and_survives_pickling() -> None:
    config = StemConfig(budget=0.5, inner="eager", dense_layers=(0,))
    assert pickle.loads(pickle.dumps(config)) == config
    torch.compile(torch.nn.Linear(2, 2), backend="stem", options=config)(torch.ones(2))


def test_lists_are_accepted_where_tuples_are_meant() -> None:
    config = StemConfig.from_options({"dense_layers": [0, 5]})
    assert [config.keeps_dense(i) for i in (0, 1, 5)] == [True, False, True]
    assert hash(config) == hash(StemConfig(dense_layers=(0, 5)))


def test_every_field_is_documented() -> None:
    for field in dataclasses.fields(StemConfig):
        assert f"{field.name}" in (StemConfig.__doc__ or ""), field.name


def test_selection_text_round_trips() -> None:
    spec = StemConfig(budget=0.25, pooling="max", key_block_size=64, prompt_length=4096).selection
    assert selection.parse(spec.text()) == spec
    assert selection.parse("") == selection.SelectionSpec()
    with pytest.raises(ValueError, match="unknown selection field"):
        selection.parse("colour=red")


def test_budgets_may_differ_by_layer_and_the_last_one_goes_on() -> None:
    config = StemConfig.from_options({"budget": [0.5, 0.25]})
    assert [config.selection_of(i).budget for i in range(4)] == [0.5, 0.25, 0.25, 0.25]
    assert hash(config) == hash(StemConfig(budget=(0.5, 0.25)))


def test_coverage_stands_in_place_of_a_budget() -> None:
    spec = StemConfig(coverage=0.95, cap=0.4).selection
    assert (spec.coverage, spec.budget, spec.pooling, spec.share) == (0.95, 0.4, "mass", "heads")
    assert selection.parse(spec.text()) == spec


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"coverage": 0.9, "budget": 0.2}, "in place of a budget"),
        ({"budget": ()}, "budget"),
        ({"budget": (0.5, None)}, "one for each attention"),
        ({"budget": (0.5, 2.0)}, "one for each attention"),
        ({"coverage": 1.5}, "coverage=1.5"),
        ({"coverage": 0.9, "cap": 0}, "cap=0"),
        ({"budget": 0.2, "pooling": "max", "share": "heads"}, "pooling='mass'"),
        ({"coverage": 0.9, "pooling": "max"}, "pooling='mass'"),
        ({"share": "heads"}, "pooling='mass'"),
        ({"budget": 0.2, "stride": (4, 5)}, "stride"),
        ({"budget": 0.2, "stride": (4, 8, 8)}, "pair"),
        ({"budget": 0.2, "stride": (4, 8), "pooling": "max"}, "pair"),
        ({"budget": 0.2, "share": "head"}, "did you mean 'heads'"),
        ({"budget": 0.2, "kept": 2}, "kept=2"),
    ],
)
def test_options_of_mass_pooling_that_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words.replace("(", r"\(")):
        StemConfig.from_options(options)


def test_the_schedule_is_published_and_a_budget_takes_what_selects_best() -> None:
    published, asked = StemConfig().selection, StemConfig(budget=0.25).selection
    assert (published.pooling, published.sink_blocks, published.local_blocks) == ("mean", 4, 4)
    assert (asked.pooling, asked.sink_blocks, asked.local_blocks) == ("mass", 1, 2)
    assert (asked.share, asked.group_sizes, published.share) == ("heads", (8, 8), "none")
    selection = StemConfig(budget=0.25, pooling="mean", sink_blocks=4, local_blocks=4).selection
    assert (selection.pooling, selection.sink_blocks, selection.local_blocks) == ("mean", 4, 4)
