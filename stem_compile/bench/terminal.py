"""Tables that never cut a number, and the progress of long work, for terminals of any width and for none."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass

from stem_compile.bench.units import duration


def width() -> int | None:
    """Columns of the terminal on stdout, or of ``COLUMNS``; None where the output goes to a file or a pipe."""
    if not sys.stdout.isatty() and not os.environ.get("COLUMNS", "").isdigit():
        return None
    return shutil.get_terminal_size().columns


@dataclass(frozen=True)
class Table:
    """Rows of text under a title. columns: headings; the first column is the row's name, the others are aligned right
    unless ``left`` names them. groups: equal neighbours are kept together, a blank line parts them; one a row, or none.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: Sequence[str] = ()
    groups: Sequence[object] = ()

    def text(self, columns: int | None) -> str:
        """The table in ``columns`` columns; one block of lines a row where it does not fit. None: no limit."""
        title = [self.title] if columns is None else textwrap.wrap(self.title, max(columns, 1))
        wide = self._wide()
        fits = columns is None or all(len(line) <= columns for line in wide)
        return "\n".join([*title, *(wide if fits else self._narrow(columns or 1))])

    def _wide(self) -> list[str]:
        cells = [list(self.columns), *map(list, self.rows)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns))]
        flush_left = [i == 0 or name in self.left for i, name in enumerate(self.columns)]
        lines = [
            "  ".join(c.ljust(w) if flush else c.rjust(w) for c, w, flush in zip(row, widths, flush_left)).rstrip()
            for row in cells
        ]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return self._parted(lines[2:], lines[:2])

    def _narrow(self, columns: int) -> list[str]:
        label = max(map(len, self.columns[1:]), default=0)
        blocks = []
        for row in self.rows:
            lines = textwrap.wrap(" ".join(filter(None, [self.columns[0], row[0]])), columns) or [""]
            for name, cell in zip(self.columns[1:], row[1:]):
                beside = f"  {name.ljust(label)}  {cell}" if name else f"  {cell}"
                if len(beside) <= columns:
                    lines.append(beside)
                else:
                    lines += textwrap.wrap(f"{name}: {cell}", columns, initial_indent="  ", subsequent_indent="    ")
            blocks.append("\n".join(lines))
        return self._parted(blocks, [])

    def _parted(self, rows: list[str], head: list[str]) -> list[str]:
        out = list(head)
        for i, row in enumerate(rows):
            if self.groups and i and self.groups[i] != self.groups[i - 1]:
                out.append("")
            out.append(row)
        return out


class Progress:
    """What long work is doing, on stderr: a line for every finished part with an estimate of the time left, and on a
    terminal the part at work. total: number of parts, None while it is not known."""

    def __init__(self, total: int | None = None) -> None:
        self.total, self.done, self._start = total, 0, time.monotonic()
        self._shown = 0

    def doing(self, what: str) -> None:
        """``what`` is at work."""
        if sys.stderr.isatty():
            columns = shutil.get_terminal_size().columns
            line = f"{self._count()}{what} ..."[: columns - 1]
            self._clear()
            sys.stderr.write(line)
            sys.stderr.flush()
            self._shown = len(line)

    def finished(self, what: str) -> None:
        """A part is finished: print ``what`` came of it."""
        self.done += 1
        self._clear()
        print(f"{self._count()}{what}{self._left()}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the part at work off the terminal."""
        self._clear()

    def _count(self) -> str:
        return "" if self.total is None else f"[{self.done}/{self.total}] "

    def _left(self) -> str:
        if self.total is None or self.done >= self.total:
            return ""
        spent = time.monotonic() - self._start
        return f"; about {duration(spent / self.done * (self.total - self.done))} left"

    def _clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r" + " " * self._shown + "\r")
            sys.stderr.flush()
            self._shown = 0
