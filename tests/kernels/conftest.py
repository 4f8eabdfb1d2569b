"""Generated modules of a test run land in a folder of their own."""

from __future__ import annotations

import os
import tempfile

os.environ["STEM_COMPILE_CACHE"] = tempfile.mkdtemp(prefix="stem_compile_")
