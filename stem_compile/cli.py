"""``stem-compile demo | explain | bench | check``: the entry point. What a user can mend is one line on stderr, not a
traceback."""

from __future__ import annotations

import sys

from stem_compile.bench.packages import Mendable, need


def main() -> None:
    """Run the command line. Exit status 1 for what the user can mend, 2 for wrong usage."""
    try:
        need("torch", "typer", "rich")
        from stem_compile.commands import app

        app()
    except Mendable as error:
        print(f"stem-compile: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
