"""Block geometry of one attention: block counts, which keys a padding hides, which block pairs may hold a visible
score."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import sympy
import torch
import torch.nn.functional as F

from stem_compile.algebra import symbolic
from stem_compile.algebra.masks import And, Full, Mask, environment
from stem_compile.algebra.symbolic import KV, B, H, Q

Shape = tuple[int, int, int, int]
"""(batch, query heads, q_len, kv_len)."""


def cdiv(a: Any, b: int) -> Any:
    """Ceiling of a / b for ints and SymInts."""
    return (a + b - 1) // b


class Parts(NamedTuple):
    """A conjunction by what its terms mean to blocks. causal: n of the term ``kv <= q + n``, None without one. bands:
    terms with a far edge (windows, chunks). keys: terms about keys alone."""

    causal: Any
    bands: tuple[Mask, ...]
    keys: tuple[Mask, ...]
    others: tuple[Mask, ...]

    @property
    def far(self) -> Any:
        """First key that query ``Q`` may see under the bands: an expression nondecreasing in ``Q``, or None."""
        return And(self.bands).far if self.bands else None


@functools.lru_cache(maxsize=1024)
def split(mask: Mask) -> Parts:
    """The terms of a conjunction by kind."""
    causal: Any = None
    bands: list[Mask] = []
    keys: list[Mask] = []
    others: list[Mask] = []
    for term in mask.terms if isinstance(mask, And) else (mask,):
        if term.causal_offset is not None and causal is None:
            causal = term.causal_offset
        elif not isinstance(term, Full):
            about_keys = not {Q, H} & term.predicate.free_symbols
            (bands if term.far is not None else keys if about_keys else others).append(term)
    return Parts(causal, tuple(bands), tuple(keys), tuple(others))


@functools.lru_cache(maxsize=1024)
def unbanded(mask: Mask) -> Mask:
    """``mask`` without its far edges: what budgets are measured against, so that a window within the budget is not
    selected on."""
    bands = split(mask).bands
    return mask if not bands else And(tuple(t for t in (mask.terms if isinstance(mask, And) else ()) if t not in bands))


def causal_offset(
    mask: Mask, shape: Shape, tensors: Sequence[torch.Tensor] = (), scalars: Sequence[int] = ()
) -> int | None:
    """Number of keys before the first query row under ``mask``'s causal term; None without one. Reads a 0-d tensor's
    value back."""
    causal = split(mask).causal
    return (
        None if causal is None else int(symbolic.evaluate(sympy.sympify(causal), environment(shape, tensors, scalars)))
    )


def key_visible(
    mask: Mask, shape: Shape, tensors: Sequence[torch.Tensor], scalars: Sequence[int], device: torch.device
) -> torch.Tensor | None:
    """Bool [B or 1, kv_len]: keys that the key-only terms leave visible; None when there are no such terms."""
    keys = split(mask).keys
    if not keys:
        return None
    env = environment(shape, tensors, scalars)
    env |= {B: torch.arange(shape[0], device=device)[:, None], KV: torch.arange(shape[3], device=device)[None, :]}
    visible = symbolic.as_tensor(symbolic.evaluate(sympy.And(*(t.predicate for t in keys)), env), device)
    # A condition of lengths alone has no dimensions.
    expanded: torch.Tensor = torch.atleast_2d(visible).expand(-1, shape[3])
    return expanded


def first_visible(visible: torch.Tensor | None, kv_len: int, block_k: int, device: torch.device) -> torch.Tensor:
    """int32 [B or 1, key blocks]: position of each block's first visible key, kv_len where the block has none."""
    blocks = cdiv(kv_len, block_k)
    position = torch.arange(blocks * block_k, device=device, dtype=torch.int32)
    if visible is None:
        return position[None, ::block_k].contiguous()
    padded = F.pad(visible, (0, blocks * block_k - kv_len))
    return torch.where(padded, position, kv_len).view(len(visible), blocks, block_k).amin(-1)


def candidates(
    mask: Mask,
    shape: Shape,
    tensors: Sequence[torch.Tensor],
    scalars: Sequence[int],
    block_q: int,
    block_k: int,
    device: torch.device | str,
) -> torch.Tensor:
    """Bool [B or 1, H or 1, query blocks, key blocks]: pairs that may hold a visible score.

    Every pair that holds one is there. Causal & padding are exact; other terms are bounded over the block by interval
    arithmetic, with the extremes of what they load, so a pair may be there that turns out empty. O(blocks^2) memory and
    no loop over rows.
    """
    device = torch.device(device)
    q_len, kv_len = shape[2:]
    rows = cdiv(q_len, block_q)
    causal, bands, _, others = parts = split(mask)
    env = environment(shape, tensors, scalars)
    env |= {
        B: torch.arange(shape[0], device=device).view(-1, 1, 1, 1),
        H: torch.arange(shape[1], device=device).view(1, -1, 1, 1),
    }
    first = first_visible(key_visible(mask, shape, tensors, scalars, device), kv_len, block_k, device)[:, None, None, :]
    possible = (first < kv_len).expand(-1, -1, rows, -1)
    start = torch.arange(rows, device=device).view(1, 1, -1, 1) * block_q
    if causal is not None:
        last = (start + block_q).clamp(max=q_len) - 1 + symbolic.evaluate(sympy.sympify(causal), env)
        possible = possible & (first <= last)
    if bands:
        end = torch.arange(1, first.shape[-1] + 1, device=device) * block_k - 1
        possible = possible & (end >= symbolic.evaluate(sympy.sympify(parts.far), env | {Q: start}))
    for term in others:
        possible = possible & _possible(term.predicate, shape, tensors, scalars, block_q, block_k, device)
    return possible


def _possible(
    predicate: Any,
    shape: Shape,
    tensors: Sequence[torch.Tensor],
    scalars: Sequence[int],
    block_q: int,
    block_k: int,
    device: torch.device,
) -> Any:
    """Bool tensor, broadcastable to the block pairs: whether ``predicate`` can be true anywhere in them. Waits for no
    device."""
    box = _box(shape, scalars, block_q, block_k, device)
    widths = _widths(predicate, _box(shape, scalars, block_q, block_k, torch.device("cpu")))
    box |= {symbolic.tensor(i): _extremes(t, widths.get(i, ())) for i, t in enumerate(tensors)}
    return symbolic.as_tensor(symbolic.bounds(predicate, box)[1], device)


def _box(shape: Shape, scalars: Sequence[int], block_q: int, block_k: int, device: torch.device) -> dict[Any, Any]:
    """What the symbols of a predicate range over in each block pair."""
    q_len, kv_len = shape[2:]
    row, key = (
        torch.arange(cdiv(n, block), device=device) * block for n, block in ((q_len, block_q), (kv_len, block_k))
    )
    row, key = row.view(1, 1, -1, 1), key.view(1, 1, 1, -1)
    box: dict[Any, Any] = {s: (v, v) for s, v in environment(shape, (), scalars).items()}
    batch, heads = (torch.arange(n, device=device) for n in shape[:2])
    box |= {B: (batch.view(-1, 1, 1, 1),) * 2, H: (heads.view(1, -1, 1, 1),) * 2}
    box |= {Q: (row, (row + block_q).clamp(max=q_len) - 1), KV: (key, (key + block_k).clamp(max=kv_len) - 1)}
    return box


def _widths(predicate: Any, box: dict[Any, Any]) -> dict[int, list[int | None]]:
    """For each tensor and dimension that ``predicate`` reads, the most entries that a block pair reads there; None
    where that depends on tensors."""
    widths: dict[int, list[int | None]] = {}
    for load in predicate.atoms(sympy.core.function.AppliedUndef):
        most = []
        for index in load.args:
            # Summands without a position are one value for all positions of a block.
            moving = sympy.Add(*(t for t in sympy.Add.make_args(symbolic.expand(index)) if {Q, KV} & t.free_symbols))
            low, high = symbolic.bounds(moving, box)
            width = torch.as_tensor(high - low).max().item() + 1
            most.append(int(width) if width < symbolic.INFINITE else None)
        number = symbolic.load_index(load)
        assert number is not None
        before = widths.get(number, most)
        widths[number] = [None if a is None or b is None else max(a, b) for a, b in zip(before, most)]
    return widths


def _extremes(values: torch.Tensor, widths: Sequence[int | None]) -> Any:
    """Load function over intervals: (least, greatest) value between each index's low and high, which are at most
    ``widths`` entries."""
    values = values.to(torch.uint8) if values.dtype == torch.bool else values

    def load(*index: tuple[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = values, values
        # At least one dimension each: a 0-d index would be read back to the host.
        where: list[torch.Tensor] = []
        for dim, (start, end) in enumerate(index):
            if values.shape[dim] == 1:
                where.append(torch.zeros(1, dtype=torch.long, device=values.device))
            elif start is end:
                where.append(torch.atleast_1d(symbolic.as_tensor(start, values.device)).clamp(0, values.shape[dim] - 1))
            elif (
                isinstance(start, torch.Tensor) and isinstance(end, torch.Tensor) and (width := widths[dim]) is not None
            ):
                low, high = (
                    _pooled(low, dim, start, end, width, torch.amin),
                    _pooled(high, dim, start, end, width, torch.amax),
                )
                where.append(torch.arange(start.numel(), device=values.device).view(start.shape))
            else:
                low, high = low.amin(dim, keepdim=True), high.amax(dim, keepdim=True)
                where.append(torch.zeros(1, dtype=torch.long, device=values.device))
        return symbolic.widened(low[tuple(where)]), symbolic.widened(high[tuple(where)])

    return load


def _pooled(
    values: torch.Tensor, dim: int, start: torch.Tensor, end: torch.Tensor, width: int, pool: Any
) -> torch.Tensor:
    """Extreme of ``values`` along ``dim`` between each start and end (at most ``width`` entries, clamped into range):
    dim gets ``start.numel()``."""
    size = values.shape[dim]
    low, high = start.flatten().clamp(0, size - 1), end.flatten().clamp(0, size - 1)
    index = torch.minimum(low[:, None] + torch.arange(min(width, size), device=values.device), high[:, None])
    gathered = values.index_select(dim, index.flatten()).unflatten(dim, index.shape)
    result: torch.Tensor = pool(gathered, dim + 1)
    return result
