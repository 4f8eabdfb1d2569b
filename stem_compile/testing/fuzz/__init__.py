"""Random programs of attentions, held against themselves: ``stem-compile fuzz`` and the strategy behind it.

A trial is a small frozen record (``program``), drawn by Hypothesis so that failures shrink (``draw``), written out as a
script of a page (``write``) and judged by running that script (``judge``). ``campaign`` does so for thousands.
"""

from stem_compile.testing.fuzz.judge import Outcome, judge
from stem_compile.testing.fuzz.program import Attention, Program, Trial
from stem_compile.testing.fuzz.write import script

__all__ = ["Attention", "Outcome", "Program", "Trial", "judge", "script"]
