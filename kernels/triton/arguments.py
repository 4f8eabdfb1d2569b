"""What generated kernels take of a mask and a score at run time: tensors, their layouts, scalars."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from stem_compile.algebra.masks import decode
from stem_compile.algebra.scores import decode as decode_score
from stem_compile.kernels.triton import codegen


@functools.lru_cache(maxsize=1024)
def _ranks(mask: str, score: str) -> tuple[tuple[int, int], ...]:
    return tuple(sorted(codegen.loads(decode(mask), decode_score(score)).items()))


def arguments(
    tensors: Sequence[torch.Tensor],
    scalars: Sequence[int],
    mask: str,
    score: str = "",
    device: torch.device | None = None,
) -> tuple[tuple, tuple, tuple]:
    """(tensors, layouts, scalars) as the generated functions take them: layouts is flat, size and stride of each
    dimension read.

    device: where the kernel runs; a tensor of no dimensions may lie on the host, as torch allows. Raises OverflowError
    for a scalar that positions in int32 cannot be added to.
    """
    for number, scalar in enumerate(scalars):
        if abs(scalar) >= codegen.LARGEST_SCALAR:
            raise OverflowError(
                f"S{number} is {scalar}: kernels add runtime scalars to positions in int32, which cannot wrap below "
                f"{codegen.LARGEST_SCALAR}"
            )
    ranks = _ranks(mask, score)
    if not ranks:
        return (), (), tuple(scalars)
    layouts: list[int] = []
    for index, _ in ranks:
        for pair in zip(tensors[index].shape, tensors[index].stride()):
            layouts.extend(pair)
    used = tensors[: ranks[-1][0] + 1]
    if device is not None:
        used = [t if t.device == device else t.to(device, non_blocking=True) for t in used]
    return tuple(t.view(torch.uint8) if t.dtype is torch.bool else t for t in used), tuple(layouts), tuple(scalars)
