"""``python -m stem_compile`` is ``stem-compile``."""

from stem_compile.cli import main

if __name__ == "__main__":
    main()
