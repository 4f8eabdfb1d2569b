"""``stem-compile``: the entry point. What a user can mend is one line on stderr, not a traceback."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from stem_compile import __version__, commands
from stem_compile.commands.arguments import INTERRUPTED
from stem_compile.packages import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage in front of it."""
        print(f"{self.prog}: {message}; {self.prog} --help shows what it takes", file=sys.stderr)
        raise SystemExit(2)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = _Parser(
        prog="stem-compile",
        description="Block-sparse prefill for any model: torch.compile(model, backend='stem').",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"stem-compile {__version__}")
    subparsers = top.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name in commands.NAMES:
        module = importlib.import_module(f"stem_compile.commands.{name}")
        sub = subparsers.add_parser(name, help=module.HELP, description=module.HELP, allow_abbrev=False)
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return top


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 1 for what the user can mend, 2 for wrong usage, 3 for a check
    that fails, 130 after Ctrl-C."""
    top = parser()
    arguments = top.parse_args(argv)
    if arguments.command is None:
        top.print_help()
        return 0
    try:
        return int(arguments.run(arguments))
    except UserError as error:
        print(f"stem-compile: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stem-compile: stopped; nothing was finished", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has gone; nothing more can be said to it.
        sys.stderr.close()
        return 1


def main() -> NoReturn:
    """The ``stem-compile`` script."""
    sys.exit(run())


if __name__ == "__main__":
    main()
