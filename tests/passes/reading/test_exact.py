"""Floating point is not the rationals: comparisons are read only where the graph's dtypes hold both sides exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
import torch.nn.functional as F

from stem_compile.algebra.symbolic import KV, H, Q, Where, tensor
from stem_compile.passes.graph.values import value
from stem_compile.passes.reading import exact
from tests.numerics import assert_close
from tests.passes.by_hand import randn
from tests.passes.capture import rewritten

N = 96
HALF = sympy.Rational(1, 2)


@pytest.mark.parametrize(
    ("dtype", "expr", "bounds", "held"),
    [
        (torch.float32, Q - KV, (-N, N), True),
        (torch.float32, HALF * Q, (0, N), True),
        (torch.float32, Q * sympy.Rational(0.02), (0, N), False),
        (torch.float32, Q * 1000, (0, N * 10**6), False),
        (torch.bfloat16, Q, (0, 255), True),
        (torch.bfloat16, Q, (0, 300), False),
        (torch.float16, Q * HALF, (0, 1000), True),
        (torch.float32, tensor(0)(Q), (-N, N), False),
        (torch.float32, Where(Q < 3, sympy.Integer(0), HALF), (0, 1), True),
        (torch.float32, sympy.Rational(1, 3), (0, 1), False),
    ],
)
def test_what_a_dtype_holds(dtype: torch.dtype, expr: sympy.Expr, bounds: tuple[int, int], held: bool) -> None:
    assert exact.holds(dtype, expr, bounds) is held


def test_constants_are_those_of_the_dtype() -> None:
    third = sympy.Rational(1, 3)
    assert exact.rounded(third, torch.float32) == sympy.Rational(torch.tensor(1 / 3).item())
    assert exact.rounded(Where(Q < 3, third, HALF), torch.bfloat16).args[1:] == (sympy.Rational(171, 512), HALF)
    assert exact.rounded(H * third, torch.float32) == H * third


Rows = torch.Tensor
# Visible where this holds, beside the causal mask; rows and keys are integers.
MASKS: dict[str, Callable[[Rows, Rows], Rows]] = {
    "fractional positions": lambda i, j: (i * 0.02 - j * 0.02) <= 0.5,
    "fractional positions in half precision": lambda i, j: (i * 0.25).bfloat16() - (j * 0.25).bfloat16() < 5,
    "a threshold just beside a whole number": lambda i, j: (i - j) < 20.0000001,
    "a threshold as a tensor": lambda i, j: (i - j) < torch.tensor(20.5),
    "a threshold as a half": lambda i, j: (i - j).half() < torch.tensor(20.5, dtype=torch.half),
    "divided": lambda i, j: (i - j) / 7 <= 3 / 7,
    "a power": lambda i, j: (i - j + 1.0) ** 0.5 < 3**0.5,
    "an exponential": lambda i, j: torch.exp((j - i) * 0.1) > 0.135335,
    "times in seconds": lambda i, j: (i / 50 - j / 50) < 0.3,
    "positions that overflow int32": lambda i, j: (i.int() * 100_000_000) >= (j.int() * 100_000_000),
    "positions that overflow int64": lambda i, j: (i * 2**60) >= (j * 2**60),
    "bits of a float": lambda i, j: (i.int().view(torch.float32) * 1e38) >= j.int().view(torch.float32),
    "a constant of float32": lambda i, j: torch.where(i - j < 9, 0.1, 0.2) == 0.1,
    "beyond what float32 counts": lambda i, j: (i + 2.0**24) - 2.0**24 >= j,
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_masks_are_what_the_dtypes_make_of_them(name: str, dynamic: bool) -> None:
    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n = q.shape[2]
        i, j = torch.arange(n)[:, None], torch.arange(n)[None, :]
        mask = (MASKS[name](i, j) & (j <= i)) | (i == j)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    inputs = tuple(randn(1, 2, N, 16, seed=seed) for seed in range(3))
    result, out = rewritten(model, inputs, dynamic=dynamic)
    assert len(result.attentions) == 1
    assert_close(out, model(*inputs))


def test_a_bias_in_half_precision_keeps_its_rounding() -> None:
    """ALiBi as Falcon computes it: in bf16, where position 257 is 256 or 258."""

    def model(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor) -> torch.Tensor:
        n = q.shape[2]
        alibi = slopes[:, None, None].bfloat16() * torch.arange(n)[None, None, :].bfloat16()
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-1, -2) + alibi).masked_fill(hidden, torch.finfo(q.dtype).min)
        return scores.softmax(-1) @ v

    inputs = (*(randn(1, 2, 600, 16, seed=seed) for seed in range(3)), torch.tensor([0.7, 0.3]))
    result, out = rewritten(model, inputs)
    assert [site.words.partition(",")[0] for site in result.sites] == ["causal"]
    assert all(value(t).dim() < 2 or value(t).shape[-2] == 1 for t in result.sites[0].tensors)
    assert_close(out, model(*inputs))
