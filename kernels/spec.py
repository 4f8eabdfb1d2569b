"""What a generated kernel depends on: one frozen value that names the source, the cache entry and the choice shown to
users."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass

import torch

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""Element types the kernels compute in, by the short name used in specs."""


@dataclass(frozen=True)
class KernelSpec:
    """Everything that changes a kernel's source and nothing else; lengths, strides and head counts are runtime
    arguments.

    template: file in ``kernels/triton/templates``. dtype: short name of q, k and v's type. head_dim, value_dim: sizes
    of a q/k row and a v row.
    block_q, block_k: tokens a query block and a key block. mask: ``masks.encode`` text. selection:
    ``SelectionSpec.text()`` where the template needs budgets or pooling, else empty. score: ``Score.text``.
    """

    template: str
    dtype: str = "bf16"
    head_dim: int = 128
    value_dim: int = 128
    block_q: int = 128
    block_k: int = 128
    mask: str = "True"
    selection: str = ""
    score: str = ""

    @property
    def name(self) -> str:
        """Short and readable: the ``kernel`` argument of the stem:: operators. Mask and score travel beside it."""
        dims = f"d{self.head_dim}" if self.head_dim == self.value_dim else f"d{self.head_dim}/{self.value_dim}"
        return f"{self.template} {self.dtype} {dims} {self.block_q}x{self.block_k}" + (" +score" if self.score else "")

    @property
    def header(self) -> str:
        """The spec as the generated module's first comment lines."""
        return "".join(f"#   {field} = {value!r}\n" for field, value in asdict(self).items())


@functools.lru_cache(maxsize=256)
def template_of(kernel: str) -> str:
    """Template named by a ``KernelSpec.name``."""
    return kernel.split(" ", 1)[0]
