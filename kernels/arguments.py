"""What generated kernels take of a mask and a score at run time: tensors, their layouts, scalars."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from stem_compile.kernels import codegen
from stem_compile.masks import decode
from stem_compile.scores import decode as decode_score


@functools.lru_cache(maxsize=1024)
def _ranks(mask: str, score: str) -> tuple[tuple[int, int], ...]:
    return tuple(sorted(codegen.loads(decode(mask), decode_score(score)).items()))


def arguments(tensors: Sequence[torch.Tensor], scalars: Sequence[int], mask: str, score: str = "") -> tuple[tuple, tuple, tuple]:
    """(tensors, layouts, scalars) as the generated functions take them: layouts is flat, size and stride of each dimension read."""
    ranks = _ranks(mask, score)
    if not ranks:
        return (), (), tuple(scalars)
    layouts: list[int] = []
    for index, _ in ranks:
        for pair in zip(tensors[index].shape, tensors[index].stride()):
            layouts.extend(pair)
    used = tuple(t.view(torch.uint8) if t.dtype is torch.bool else t for t in tensors[: ranks[-1][0] + 1])
    return used, tuple(layouts), tuple(scalars)
