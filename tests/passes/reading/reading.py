"""What the interpreter reads of a node, evaluated at every place."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from stem_compile.algebra import symbolic
from stem_compile.passes.reading.interpret import Interpreter
from stem_compile.passes.reading.split_logits import LARGEST, in_floats


def evaluated(node: fx.Node, interpreter: Interpreter | None = None) -> torch.Tensor:
    """The tensor that the expressions read of ``node`` give, in the dtype and shape of its value. Raises Unreadable."""
    interpreter = interpreter or Interpreter()
    known = node.meta["example_value"]
    places = sympy.symbols(f"p:{max(known.dim(), 1)}", integer=True, nonnegative=True)[: known.dim()]
    expr = in_floats(sympy.sympify(interpreter.tensor(node).at(tuple(places))), LARGEST)
    env: dict[Any, Any] = {
        place: torch.arange(size).view([-1 if n == m else 1 for m in range(known.dim())])
        for n, (place, size) in enumerate(zip(places, known.shape, strict=True))
    }
    for number, leaf in enumerate(interpreter.leaves):
        assert isinstance(leaf, fx.Node)
        env[symbolic.tensor(number)] = _load(leaf.meta["example_value"])
    result = torch.as_tensor(symbolic.evaluate(expr, env))
    return boundless(result.to(known.dtype)).expand(known.shape)


def boundless(x: torch.Tensor) -> torch.Tensor:
    """Numbers that scores do not tell from infinity as infinity."""
    return torch.where(x.abs() >= LARGEST, x.sign() * torch.inf, x) if x.is_floating_point() else x


def _load(values: torch.Tensor) -> Any:
    return lambda *index: values[tuple(torch.as_tensor(i).clamp(0, n - 1) for i, n in zip(index, values.shape))]
