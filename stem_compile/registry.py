"""One mechanism for everything that can be added: policies, patterns, device targets, kernel templates.

A registry lists its members by name. Built-in ones are files, found by their name in one folder; third parties add
theirs by an entry point of the registry's group, or by ``register``. Listing names imports nothing: a member is loaded
when it is first asked for, and checked against its contract then.
"""

from __future__ import annotations

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

Member = TypeVar("Member")
Cached = TypeVar("Cached", bound=Callable[..., object])


class RegistryError(ValueError):
    """A name that is not there, is there twice, or whose member cannot be loaded or breaks its contract."""


class Registered(Generic[Member]):
    """What ``Registry.register`` returns; as a context manager it takes the member away again."""

    def __init__(self, registry: Registry[Member], name: str) -> None:
        self._registry, self._name = registry, name

    def __enter__(self) -> Registered[Member]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._name in self._registry.registered():
            self._registry.unregister(self._name)


class Registry(Generic[Member]):
    """Members of one kind by name.

    kind: what a member is called in messages. contract: the Protocol whose names every member has. folder, package:
    where the built-in members are, as a path and as a package. layout: place of a member within both, such as "{}.py"
    or "{}/target.py". group: entry-point group of third parties. read: makes a built-in member of its file; None where
    the file is a module that is the member.
    """

    def __init__(
        self,
        kind: str,
        contract: type,
        *,
        folder: Path,
        package: str,
        group: str,
        layout: str = "{}.py",
        read: Callable[[Path], Member] | None = None,
    ) -> None:
        self.kind, self.contract, self.group = kind, contract, group
        self._folder, self._package, self._layout, self._read = folder, package, layout, read
        self._registered: set[str] = set()
        self._ready: dict[str, Member] = {}
        self._loaded: dict[tuple[str, str], Member | RegistryError] = {}
        self._warned: set[str] = set()
        self._dependent: list[Callable[[], None]] = []

    def names(self) -> tuple[str, ...]:
        """All names, sorted. Nothing is imported, so a name may still turn out not to load."""
        return tuple(sorted({*self.builtin(), *self._entry_points(), *self._registered}))

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def builtin(self) -> tuple[str, ...]:
        """Names of the built-in members, sorted."""
        return _files(self._folder, self._layout)

    def registered(self) -> tuple[str, ...]:
        """Names added by ``register``, sorted."""
        return tuple(sorted(self._registered))

    def get(self, name: str) -> Member:
        """The member called ``name``. Raises RegistryError for an unknown name and for a member that cannot be used."""
        if name in self._ready:
            return self._ready[name]
        points = self._entry_points().get(name, ())
        if name not in self.builtin() and not points:
            raise RegistryError(f"unknown {self.kind} {name!r}; there are {', '.join(self.names())}")
        source = "" if name in self.builtin() else " and ".join(sorted(_origin(point) for point in points))
        if (name, source) not in self._loaded:
            self._loaded[name, source] = self._load(name, points if source else ())
        member = self._loaded[name, source]
        if isinstance(member, RegistryError):
            raise member
        if not source:  # entry points come and go with sys.path
            self._ready[name] = member
        return member

    def members(self) -> Iterator[tuple[str, Member]]:
        """(name, member) of all that load, in the names' order. One that does not is left out with one warning."""
        for name in self.names():
            try:
                member = self.get(name)
            except RegistryError as error:
                self._warn(name, f"left out: {error}")
                continue
            for point in self._entry_points().get(name, ()) if name in self.builtin() else ():
                self._warn(_origin(point), f"{self.kind} {name!r} of {_origin(point)} left out: the name is built in")
            yield name, member

    def register(self, name: str, member: Member) -> Registered[Member]:
        """Add a member, for this process or for a ``with``. Raises RegistryError where the name is taken or the member
        lacks something of its contract."""
        if name in self.names():
            raise RegistryError(f"{self.kind} {name!r} is there already; unregister it first or choose another name")
        self._require(name, member)
        self._registered.add(name)
        self._ready[name] = member
        self._changed()
        return Registered(self, name)

    def unregister(self, name: str) -> None:
        """Take away what ``register`` added. Raises RegistryError for any other name."""
        if name not in self._registered:
            raise RegistryError(
                f"{self.kind} {name!r} was not added by register(); added were {', '.join(self.registered()) or 'none'}"
            )
        self._registered.remove(name)
        del self._ready[name]
        self._changed()

    def caches(self, function: Cached) -> Cached:
        """Decorator for ``functools`` caches of what members answer: emptied when a member comes or goes."""
        self._dependent.append(function.cache_clear)  # type: ignore[attr-defined]
        return function

    def _changed(self) -> None:
        for clear in self._dependent:
            clear()

    def _entry_points(self) -> dict[str, tuple[EntryPoint, ...]]:
        return _entry_points(self.group, tuple(sys.path))

    def _load(self, name: str, points: tuple[EntryPoint, ...]) -> Member | RegistryError:
        if len(points) > 1:
            both = " and ".join(sorted(_origin(point) for point in points))
            return RegistryError(f"{self.kind} {name!r} comes from {both}; uninstall all but one")
        place = self._layout.format(name)
        try:
            if points:
                member: Any = points[0].load()
            elif self._read is not None:
                member = self._read(self._folder / place)
            else:
                member = importlib.import_module(f"{self._package}.{place.removesuffix('.py').replace('/', '.')}")
            self._require(name, member)
        except Exception as error:
            source = f" of {_origin(points[0])}" if points else ""
            return RegistryError(f"{self.kind} {name!r}{source} cannot be used: {type(error).__name__}: {error}")
        loaded: Member = member
        return loaded

    def _require(self, name: str, member: object) -> None:
        missing = [part for part in contract_names(self.contract) if not hasattr(member, part)]
        if missing:
            raise RegistryError(
                f"{self.kind} {name!r} lacks {', '.join(missing)}; {self.contract.__module__}.{self.contract.__name__}"
                " says what they are"
            )

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=3)


def contract_names(contract: type) -> tuple[str, ...]:
    """Names that a Protocol asks for, sorted: its attributes and its functions."""
    names = {*getattr(contract, "__annotations__", {}), *(n for n, v in vars(contract).items() if callable(v))}
    return tuple(sorted(n for n in names if not n.startswith("_")))


def _origin(point: EntryPoint) -> str:
    package = point.dist.name if point.dist is not None else "an unnamed package"
    return f"{package} ({point.value})"


@functools.lru_cache(maxsize=16)
def _files(folder: Path, layout: str) -> tuple[str, ...]:
    names = (path.relative_to(folder).parts[0].removesuffix(".py") for path in folder.glob(layout.format("*")))
    return tuple(sorted(name for name in names if not name.startswith("_")))


@functools.lru_cache(maxsize=16)
def _entry_points(group: str, path: tuple[str, ...]) -> dict[str, tuple[EntryPoint, ...]]:
    """Entry points by name. path: ``sys.path`` that they are searched on, so that another one is searched anew."""
    points: dict[str, tuple[EntryPoint, ...]] = {}
    for point in entry_points(group=group):
        # A distribution that is on the path twice (an editable install beside its source) is one.
        if not any(point.value == other.value for other in points.get(point.name, ())):
            points[point.name] = (*points.get(point.name, ()), point)
    return points
