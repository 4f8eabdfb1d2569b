"""``stem-compile`` in this process, for tests."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

from stem_compile import cli


@dataclass(frozen=True)
class Done:
    """status: exit status. out, err: what was printed."""

    status: int
    out: str
    err: str


def stem_compile(*arguments: str) -> Done:
    """Run ``stem-compile arguments``."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.run(arguments)
        except SystemExit as stop:
            status = int(stop.code or 0)
    return Done(status, out.getvalue(), err.getvalue())
