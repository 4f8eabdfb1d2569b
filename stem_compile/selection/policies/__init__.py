"""Selection policies, one file each. ``selection/policy.py`` says what a policy is.

Third parties add one by the entry point group ``stem_compile.policies`` or by ``POLICIES.register("name", policy)``.
"""

from __future__ import annotations

from pathlib import Path

from stem_compile.registry import Registry
from stem_compile.selection.policy import Option, Policy
from stem_compile.selection.spec import parse

POLICIES: Registry[Policy] = Registry(
    "policy", Policy, folder=Path(__file__).parent, package=__name__, group="stem_compile.policies"
)
POLICIES.caches(parse)


def names() -> tuple[str, ...]:
    """All policies, sorted."""
    return POLICIES.names()


def get(name: str) -> Policy:
    """The policy called ``name``. Raises RegistryError, a ValueError, naming the valid ones."""
    return POLICIES.get(name)


def options(name: str) -> dict[str, Option]:
    """Options of the policy's own by name; a policy without ``OPTIONS`` has none."""
    return {option.name: option for option in getattr(get(name), "OPTIONS", ())}
