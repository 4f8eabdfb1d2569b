"""Prompts that outgrow one device: the tokens of a sequence split over the ranks of a process group.

``shard`` gives each rank its tokens, ``torch.compile(model, backend="stem", options={"context_parallel": mesh})``
computes every attention over all of them, and ``unshard`` puts outputs together again.
"""

from stem_compile.distributed.balance import balanced
from stem_compile.distributed.shard import Shard, shard, unshard
from stem_compile.distributed.split import ORDERS, SplitError, TokenSplit

__all__ = ["ORDERS", "Shard", "SplitError", "TokenSplit", "balanced", "shard", "unshard"]
