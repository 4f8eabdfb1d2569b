"""Cut a batch of prompts into the ranks' parts, and put outputs together again."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from stem_compile.distributed.split import SplitError, TokenSplit


class Shard(NamedTuple):
    """This rank's tokens: arguments of a model by name. input_ids, position_ids, attention_mask: int64
    [B, tokens of a rank]."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor


def shard(
    mesh: Any,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    *,
    order: str = "zigzag",
    block_size: int = 128,
    pad_token: int = 0,
) -> Shard:
    """This rank's part of prompts that every rank holds.

    mesh: 1-D DeviceMesh or ProcessGroup, or the split that ``balanced`` makes for one. input_ids: int64 [B, N].
    position_ids: [B, N] or [1, N], None: 0 to N - 1. attention_mask: [B, N], 1 is a real token, None: all are. order:
    as option ``context_parallel_order``. block_size: as the option of that name; chunks are whole blocks, so that
    blocks are those of one process. Prompts are padded on the right with ``pad_token``, which causal attention of real
    tokens never sees; ``unshard(..., length=N)`` cuts it off.

    Position ids continue through the padding. The attention mask is always there: without one, models take jumps of
    the position ids for the borders of packed documents.

    Raises SplitError for a mesh, an order or shapes that do not fit.
    """
    split = TokenSplit.of(mesh, order)
    if input_ids.dim() != 2:
        raise SplitError(f"input_ids of shape {tuple(input_ids.shape)}: [batch, tokens] is what can be split")
    batch, length = input_ids.shape
    if position_ids is None:
        position_ids = torch.arange(length, device=input_ids.device)[None]
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    for name, x in (("position_ids", position_ids), ("attention_mask", attention_mask)):
        if x.dim() != 2 or x.shape[1] != length or x.shape[0] not in (1, batch):
            raise SplitError(f"{name} of shape {tuple(x.shape)} beside input_ids of shape {tuple(input_ids.shape)}")
    missing = -length % (split.chunks * block_size)
    later = position_ids[:, -1:] + torch.arange(1, missing + 1, device=position_ids.device)
    whole = (
        F.pad(input_ids, (0, missing), value=pad_token),
        torch.cat([position_ids, later], 1).expand(batch, -1),
        F.pad(attention_mask.to(torch.int64), (0, missing)).expand(batch, -1),
    )
    return Shard(*(split.part(x, 1).contiguous() for x in whole))


def unshard(
    mesh: Any, x: torch.Tensor, *, dim: int = 1, length: int | None = None, order: str = "zigzag"
) -> torch.Tensor:
    """All ranks' parts of an output in the order of the sequence, on every rank.

    x: this rank's part, with its tokens in dimension ``dim``. length: tokens before ``shard`` padded them, None keeps
    all. Raises SplitError where the tokens are no whole chunks.
    """
    split = TokenSplit.of(mesh, order)
    split.chunk_length(x.shape[dim])
    collectives = torch.ops._c10d_functional
    flat = collectives.all_gather_into_tensor(x.contiguous(), split.ranks, split.group)
    parts = collectives.wait_tensor(flat).reshape(split.ranks, *x.shape)
    whole = split.gathered(parts, dim if dim >= 0 else dim + x.dim())
    return whole if length is None else whole.narrow(dim, 0, length)
