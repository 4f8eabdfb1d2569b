"""Faults of kernels: what is computed for a list of blocks."""

from __future__ import annotations

from typing import Any

import torch

from stem_compile import selection
from stem_compile.selection import FULL
from tests.testing.plants import Call, Patch, attend, expanded, fault, output, plain


@fault("grouped queries: key heads interleaved the wrong way", "dense-equivalence")
def _(patch: Patch) -> None:
    attend(patch, **{n: lambda c, n=n: c[n].repeat(1, c["q"].shape[1] // c[n].shape[1], 1, 1) for n in ("k", "v")})  # type: ignore[misc]


@fault("grouped queries: head map shifted by one", "dense-equivalence")
def _(patch: Patch) -> None:
    attend(patch, k=lambda c: c["k"].roll(1, 1), v=lambda c: c["v"].roll(1, 1))


@fault("values of the neighbouring key head", "dense-equivalence")
def _(patch: Patch) -> None:
    attend(patch, v=lambda c: c["v"].roll(1, 1))


@fault("wrong strides on a transposed view", "dense-equivalence")
def _(patch: Patch) -> None:
    attend(patch, q=lambda c: c["q"].transpose(1, 2).reshape(c["q"].shape))


@fault("ragged last block read past its end", "dense-equivalence")
def _(patch: Patch) -> None:
    def weights(scores: torch.Tensor, dense: torch.Tensor, call: Call) -> torch.Tensor:
        # The keys that are not there are zeros, so their scores are, and the sum of the weights has them.
        missing = -scores.shape[-1] % selection.parse(call["spec"]).block_k
        return torch.nn.functional.pad(scores, (0, missing)).softmax(-1)[..., : scores.shape[-1]].nan_to_num()

    plain(patch, weights)


@fault("the last selected block is dropped", "kernel-exactness")
def _(patch: Patch) -> None:
    attend(patch, counts=lambda c: torch.where(c["counts"] > 1, c["counts"] - 1, c["counts"]))


@fault("the first selected block is dropped", "kernel-exactness")
def _(patch: Patch) -> None:
    attend(
        patch,
        indices=lambda c: torch.where((c["counts"] > 1)[..., None], c["indices"].roll(-1, -1), c["indices"]),
        counts=lambda c: torch.where(c["counts"] > 1, c["counts"] - 1, c["counts"]),
    )


@fault("a selected block is counted twice", "kernel-exactness")
def _(patch: Patch) -> None:
    def weights(scores: torch.Tensor, dense: torch.Tensor, call: Call) -> torch.Tensor:
        spec = selection.parse(call["spec"])
        first = (dense.cumsum(-1) == 1) & dense & (call["counts"] != FULL)[..., None]
        return (scores + 0.6931 * expanded(first, spec, (*scores.shape[:3], scores.shape[3]))).softmax(-1).nan_to_num()  # type: ignore[arg-type]

    plain(patch, weights)


@fault("softmax without subtracting the maximum", "kernel-exactness")
def _(patch: Patch) -> None:
    plain(patch, lambda scores, *_: (scores.exp() / scores.exp().sum(-1, keepdim=True)).nan_to_num(posinf=torch.nan))


@fault("softmax in the dtype's half", "dense-equivalence")
def _(patch: Patch) -> None:
    plain(patch, lambda scores, *_: scores.bfloat16().softmax(-1).nan_to_num().float())


@fault("queries, keys and values cast to bf16", "dense-equivalence")
def _(patch: Patch) -> None:
    attend(patch, **{n: lambda c, n=n: c[n].bfloat16().float() for n in ("q", "k", "v")})  # type: ignore[misc]


@fault("a stale block list: the one before is used", "kernel-exactness")
def _(patch: Patch) -> None:
    last: dict[Any, Any] = {}

    def stale(c: Call) -> torch.Tensor:
        key = tuple(c["indices"].shape)
        before, last[key] = last.get(key, c["indices"]), c["indices"]
        return torch.where((c["counts"] == FULL)[..., None], c["indices"], before)

    attend(patch, indices=stale)


@fault("lists of batch row 0 used for all rows", "kernel-exactness")
def _(patch: Patch) -> None:
    attend(patch, **{n: lambda c, n=n: c[n][:1].expand_as(c[n]).contiguous() for n in ("indices", "counts")})  # type: ignore[misc]


@fault("lists of head 0 used for all heads", "kernel-exactness")
def _(patch: Patch) -> None:
    attend(patch, **{n: lambda c, n=n: c[n][:, :1].expand_as(c[n]).contiguous() for n in ("indices", "counts")})  # type: ignore[misc]


@fault("rows that compute everything compute one block", "dense-equivalence")
def _(patch: Patch) -> None:
    attend(patch, counts=lambda c: c["counts"].abs())


@fault("the ragged last query block is never written", "dense-equivalence")
def _(patch: Patch) -> None:
    def unwritten(c: Call, out: torch.Tensor) -> torch.Tensor:
        ragged = out.shape[2] % selection.parse(c["spec"]).block_q
        out[:, :, out.shape[2] - ragged :] = 0
        return out

    output(patch, unwritten)


@fault("uninitialised memory is added to the output", "determinism")
def _(patch: Patch) -> None:
    output(patch, lambda c, out: out + 0 * torch.empty_like(out))


@fault("rows without a visible key give NaN", "padding-invariance")
def _(patch: Patch) -> None:
    plain(patch, lambda scores, *_: scores.softmax(-1))


@fault("parts of a row are averaged, not merged by their log-sum-exp", "kernel-exactness")
def _(patch: Patch) -> None:
    def weights(scores: torch.Tensor, *_: Any) -> torch.Tensor:
        half = scores.shape[-1] // 2
        low, high = scores[..., :half].softmax(-1).nan_to_num(), scores[..., half:].softmax(-1).nan_to_num()
        both = low.any(-1, keepdim=True) & high.any(-1, keepdim=True)
        return torch.cat([low, high], -1) * torch.where(both, 0.5, 1.0)

    plain(patch, weights)


@fault("the last token is lost where a length is one beyond 128", "shape-robustness")
def _(patch: Patch) -> None:
    def lost(c: Call, out: torch.Tensor) -> torch.Tensor:
        if out.shape[2] % 128 == 1:
            out[:, :, -1] = 0
        return out

    output(patch, lost)


@fault("batches of five and more read the keys of row 0", "dense-equivalence")
def _(patch: Patch) -> None:
    attend(patch, k=lambda c: c["k"][:1].expand_as(c["k"]).contiguous() if len(c["k"]) >= 5 else c["k"])


@fault("values by the keys' heads, where these are fewer", "dense-equivalence", model="unequal heads")
def _(patch: Patch) -> None:
    attend(patch, v=lambda c: c["v"][:, :1].expand_as(c["v"]).contiguous() if c["q"].shape[1] > 1 else c["v"])


@fault("half precision reads the neighbouring value head", "half-precision")
def _(patch: Patch) -> None:
    attend(patch, v=lambda c: c["v"].roll(1, 1) if c["v"].dtype in (torch.bfloat16, torch.float16) else c["v"])


@fault("a length one beyond a block fails", "shape-robustness")
def _(patch: Patch) -> None:
    def picky(c: Call, out: torch.Tensor) -> torch.Tensor:
        if out.shape[2] % selection.parse(c["spec"]).block_q == 1:
            raise RuntimeError("planted")
        return out

    output(patch, picky)
