"""One table of tolerances, for the toolkit, the tests and the benchmarks: how far two results may be apart, and why.

Where there is a golden result in fp64, the error of plain torch in the working dtype is measured on the same inputs and
ours may be a small multiple of it. Where there is none, two results in one dtype are compared, neither of them the
truth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tolerance:
    """factor: our error against fp64 over that of plain torch in the same dtype. ulps: granted besides, in units of the
    dtype's precision at the size of the result, for inputs on which plain torch happens to be exact. why: the
    reason."""

    factor: float
    ulps: float
    why: str

    def allowed(self, error: float, size: float, dtype: torch.dtype) -> float:
        """Largest absolute error. error: plain torch's. size: of the result."""
        return self.factor * error + self.ulps * torch.finfo(dtype).eps * size


@dataclass(frozen=True)
class Closeness:
    """Two results of one dtype without a golden one. relative, absolute: in units of the dtype's precision; absolute
    serves results near 0. why: the reason."""

    relative: float
    absolute: float
    why: str

    def bounds(self, dtype: torch.dtype) -> dict[str, float]:
        """Arguments of ``torch.testing.assert_close``."""
        eps = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
        return {"rtol": self.relative * eps, "atol": self.absolute * eps}


MODEL = Tolerance(4, 8, "a whole model: two orders of summation in every layer differ by less than twice its own error")
ATTENTION = Tolerance(3, 4, "one attention: two roundings in another order stay well under it")
CPU_KERNEL = Tolerance(2, 2, "one attention of PyTorch's own calls, which round as SDPA's do")
CPU_KERNEL_FP64 = Tolerance(2, 16, "the golden result is no better than fp64 itself")
SAMPLED_ROWS = Tolerance(2, 1, "rows sampled by a benchmark: no worse than twice SDPA")

CLOSE = {
    torch.float32: Closeness(800, 80, "softmax and two products over some hundred keys, scores of order one"),
    torch.float16: Closeness(20, 20, "a result rounded to fp16 two or three times on the way"),
    torch.bfloat16: Closeness(2.5, 2.5, "a result rounded to bf16 two or three times on the way"),
}
"""Two attentions, one ours and one eager's, by their dtype."""
CLOSE_SHORT = Closeness(80, 80, "fp32 over some dozens of keys")
CLOSE_SAME = Closeness(80, 16, "one fp32 attention computed twice by the same kernels in another layout")
CLOSE_DEEP = Closeness(8000, 800, "fp32 through several layers or an attention over raw activations of large scores")
LARGE_SCORES = Closeness(0, 4.1e5, "scores of some thousands in fp32: a weight is off by the score's own last digits")
PRINTED = Closeness(8, 8, "one printed expression in fp32: a handful of operations")
PRINTED_TANH = Closeness(16, 8, "the same with a tanh of relative error 2^-20")

RELATIVE = {
    "bfloat16": (8e-3, "two to three roundings of the working type, relative to a query block"),
    "float16": (2e-3, "the same"),
}
"""Largest relative error of a sampled query block on a GPU, for benchmarks: dtype -> (error, reason)."""
