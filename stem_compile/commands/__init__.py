"""The commands of ``stem-compile``, a module each with ``HELP``, ``add_arguments(parser)`` and ``run(arguments)``.

``run`` returns the exit status. Everything heavy, torch included, is imported inside it: ``--help`` is quick and
needs nothing.
"""

from __future__ import annotations

NAMES = ("demo", "explain", "bench", "quality", "tune", "check", "fuzz", "env")
"""In the order of the help."""
