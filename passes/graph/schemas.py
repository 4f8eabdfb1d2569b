"""What torch's own operator schemas say: which argument a method is called on, what keywords are called, what is
written."""

from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def overloads(name: str) -> tuple[Any, ...]:
    """Schemas of the ATen operator ``name``, all overloads; none where there is no such operator."""
    return tuple(torch._C._jit_get_schemas_for_operator(f"aten::{name}"))


@functools.cache
def receiver_place(method: str) -> int:
    """Place of the tensor on which a method is called, among the arguments of the function of that name:
    ``x.where(condition, y)`` is ``where(condition, x, y)``."""
    for schema in overloads(method):
        names = [a.name for a in schema.arguments]
        if "self" in names:
            return names.index("self")
    return 0


@functools.cache
def keyword_places(name: str) -> dict[str, int]:
    """Place of every argument that may be given by name and stands at one place in all overloads: mat2 of bmm is 1."""
    places: dict[str, set[int]] = {}
    for schema in overloads(name):
        for place, argument in enumerate(schema.arguments):
            if not argument.kwarg_only:
                places.setdefault(argument.name, set()).add(place)
    return {word: next(iter(at)) for word, at in places.items() if len(at) == 1}


def written_arguments(schemas: tuple[Any, ...], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[Any]:
    """The arguments of a call that some overload writes, as their schemas annotate them: ``Tensor(a!)``."""
    return [
        arguments[place] if place is not None and place < len(arguments) else keywords.get(name)
        for schema in schemas
        for place, name in _written_places(schema)
    ]


_known_places: dict[int, tuple[Any, tuple[tuple[int | None, str], ...]]] = {}
"""By identity, with the schema itself, so that no identity is given twice: a schema with a list as a default has no
hash."""


def _written_places(schema: Any) -> tuple[tuple[int | None, str], ...]:
    """(place, name) of every argument that a schema writes; the place is None where only the name may be given."""
    if id(schema) not in _known_places:
        written = tuple(
            (None if argument.kwarg_only else place, argument.name)
            for place, argument in enumerate(schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        )
        _known_places[id(schema)] = schema, written
    return _known_places[id(schema)][1]
