"""Selection policies, one file each. ``selection/policy.py`` says what a policy is.

Third parties add one by the entry point group ``stem_compile.policies`` or by ``POLICIES.register("name", policy)``.
"""

from __future__ import annotations

import functools
from pathlib import Path

import sympy
import torch

from stem_compile.algebra import symbolic
from stem_compile.algebra.symbolic import BLOCKS, ROW
from stem_compile.registry import Registry
from stem_compile.selection.policy import Option, Policy
from stem_compile.selection.spec import SelectionSpec, parse

POLICIES: Registry[Policy] = Registry(
    "policy", Policy, folder=Path(__file__).parent, package=__name__, group="stem_compile.policies"
)
POLICIES.caches(parse)

SIZES = (1, 2, 7, 64, 333, 2000)
"""Numbers of key blocks that a policy is tried at."""


def names() -> tuple[str, ...]:
    """All policies, sorted."""
    return POLICIES.names()


def get(name: str) -> Policy:
    """The policy called ``name``. Raises RegistryError, a ValueError, naming the valid ones."""
    return POLICIES.get(name)


def options(name: str) -> dict[str, Option]:
    """Options of the policy's own by name; a policy without ``OPTIONS`` has none."""
    return {option.name: option for option in getattr(get(name), "OPTIONS", ())}


@POLICIES.caches
@functools.lru_cache(maxsize=256)
def check(spec: SelectionSpec) -> None:
    """Ask the policy of ``spec`` everything that it is asked at run time, at a few sizes, so that it fails here or not
    at all. Raises ValueError for an answer that breaks the contract, and whatever the policy raises."""
    policy = get(spec.policy)
    expression, forced = policy.budget(spec), spec.sinks + spec.locals
    for blocks in SIZES:
        rows = torch.arange(blocks)
        budget = torch.as_tensor(symbolic.evaluate(sympy.sympify(expression), {ROW: rows, BLOCKS: blocks})).expand(
            blocks
        )
        if budget.is_floating_point() or budget.is_complex():
            raise ValueError(f"policy {spec.policy!r}: its budget {expression} is no whole number")
        limit = budget.clamp(min=forced)
        longest, width = int(limit[limit <= rows].amax() if (limit <= rows).any() else 0), policy.width(spec, blocks)
        if longest > width:
            raise ValueError(f"policy {spec.policy!r}: {longest} blocks of {blocks} in a row, but its width is {width}")
    if policy.min_length(spec) < 0:
        raise ValueError(f"policy {spec.policy!r}: its min_length is negative")
