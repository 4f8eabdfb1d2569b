"""A model on a device that the package does not know: ``python -m tests.growth_on_toy FOLDER REGISTER``.

FOLDER: on the path, with the modules of CONTRIBUTING.md. REGISTER: "yes" to register the target and its template by
calls; otherwise an installed distribution has to. Prints one line of JSON: the kernels named and the errors against
eager.
"""

from __future__ import annotations

import importlib
import json
import sys

import torch

from stem_compile import explain
from stem_compile.kernels.contract import TARGETS
from stem_compile.kernels.triton.template import TEMPLATES
from tests import toy_device
from tests.test_growth import causal, model

OPTIONS = {"min_length": 0, "budget": 1.0, "block_size": 64, "key_block_size": 64}


def main(folder: str, register: str) -> None:
    sys.path.append(folder)
    if register == "yes":
        tile_target = importlib.import_module("tile_target")
        TEMPLATES.register("tile_rows", tile_target.TEMPLATE)
        TARGETS.register(toy_device.NAME, tile_target)
    module, x = model(causal), torch.randn(1, 150, 64)
    golden = module.double()(x.double())
    eager = module.float()(x)
    placed = x.to(toy_device.NAME)
    module.to(toy_device.NAME)
    sites = explain(module, OPTIONS)(placed).sites
    compiled = torch.compile(module, backend="stem", options=OPTIONS | {"inner": "eager", "verify": True})
    ours = compiled(placed).cpu()
    result = {
        "kernels": [site["kernel"] for site in sites],
        "reasons": [site["reason"] for site in sites],
        "error": float((ours.double() - golden).abs().max()),
        "eager": float((eager.double() - golden).abs().max()),
        "size": float(golden.abs().max()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
