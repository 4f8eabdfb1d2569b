"""Failures that are tried first the next time: a file a model and options, as short as the examples that failed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stem_compile.testing.case import Case


class Database:
    """The last failing example of each property, for one model under one set of options. A folder that cannot be
    written or a file that cannot be read is as good as none."""

    def __init__(self, folder: str | Path | None, settings: Mapping[str, Any]) -> None:
        named = {name: settings[name] for name in ("model", "parameters", "dtype", "device", "options")}
        key = hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self._path = None if folder is None else Path(folder) / f"{key}.json"

    def last(self, name: str) -> Case | None:
        """The example at which property ``name`` failed the last time."""
        kept = self._read().get(name)
        try:
            return None if kept is None else Case(**kept)
        except TypeError:
            # Written by another version.
            return None

    def keep(self, name: str, case: Case | None) -> None:
        """Remember the example at which ``name`` fails; None where it holds. Drawn inputs are not kept."""
        if self._path is None:
            return
        kept = self._read()
        before = dict(kept)
        kept.pop(name, None)
        if case is not None and case.given is None:
            kept[name] = {f.name: getattr(case, f.name) for f in dataclasses.fields(case) if f.name != "given"}
        if kept == before:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps(kept, indent=2) + "\n")
        except OSError:
            return

    def _read(self) -> dict[str, Any]:
        try:
            kept = json.loads(self._path.read_text()) if self._path is not None else {}
        except (OSError, ValueError):
            return {}
        return kept if isinstance(kept, dict) else {}
