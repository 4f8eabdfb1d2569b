"""Where in the model a node was called, whatever the version of Dynamo writes at the path's root."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from stem_compile.passes.graph.values import module_path
from tests.passes.capture import graph_of


@pytest.mark.parametrize(
    ("recorded", "path"),
    [
        ("L['self']._modules['model']._modules['layers']._modules['0'].self_attn", "model.layers.0.self_attn"),
        ("L['self'].model.layers[0]", "model.layers.0"),
        ("L['fn'].model.layers[0].self_attn", "model.layers.0.self_attn"),
        ("L['net'].layers[0]", "layers.0"),
        ("L['args'][0]._modules['layers']._modules['1']", "layers.1"),
        ("L['kwargs']['net'].layers[1]", "layers.1"),
        ("L.args.0.model.layers.3.self_attn", "model.layers.3.self_attn"),
        ("L.self.model.layers.0", "model.layers.0"),
        ("G['net'].layers[0]", "layers.0"),
        ("model.layers.0", "model.layers.0"),
        ("L['self'].args[0]", "args.0"),
        ("L['self']", "node"),
    ],
)
def test_a_path_is_the_models_own(recorded: str, path: str) -> None:
    node = fx.Graph().placeholder("node")
    node.meta["nn_module_stack"] = {"key": (recorded, torch.nn.Module)}
    assert module_path(node) == path


def test_dynamos_own_paths() -> None:
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.ReLU()))
    for function in (model, lambda x: model(x), model.forward):
        graph = graph_of(function, (torch.ones(2),)).graph
        assert {module_path(n) for n in graph.nodes if n.meta.get("nn_module_stack")} == {"0.0"}
