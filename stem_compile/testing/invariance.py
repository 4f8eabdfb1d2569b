"""What properties of invariance share: whether the model itself has the property, before its compiled form is held to
it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from stem_compile.testing import numerics
from stem_compile.testing.case import Inputs
from stem_compile.testing.subject import Subject
from stem_compile.testing.violation import Inapplicable

Cut = Callable[[torch.Tensor], torch.Tensor]


def own_holds(subject: Subject, first: Inputs, second: Inputs, of_first: Cut, of_second: Cut, allowed: float) -> None:
    """Inapplicable when the model itself gives different values for the parts of two inputs that are to be compared."""
    gap = numerics.gap(of_second(subject.own(second)), of_first(subject.own(first)), allowed)
    if not gap.ok:
        raise Inapplicable(f"the model itself does not have this property ({gap.words})")
