"""A device of this test suite's own, "toy": torch sees a device, a table of CPU tensors holds its memory.

Importing this module gives the process the device, for good; import it in a process of its own. Operators run on the
CPU tensors and results are new memory: writing into a view does not reach what it was cut from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "toy"
_setup_privateuseone_for_python_backend(NAME)
_memory: dict[int, torch.Tensor] = {}
"""Storage of a tensor on the device -> the CPU tensor that holds its elements, contiguous like itself."""


def _host(x: Any) -> Any:
    """What an argument is on the CPU."""
    if isinstance(x, torch.device):
        return torch.device("cpu") if x.type == NAME else x
    on_device = isinstance(x, torch.Tensor) and x.device.type == NAME
    return _memory[x.untyped_storage()._cdata] if on_device else x


def _placed(host: torch.Tensor) -> torch.Tensor:
    """A tensor on the device with the elements of ``host``."""
    if not host.is_contiguous() or host.storage_offset():
        host = host.clone(memory_format=torch.contiguous_format)
    tensor = torch._C._acc.create_empty_tensor(host.shape, host.dtype)
    _memory[tensor.untyped_storage()._cdata] = host
    return tensor


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator by its CPU implementation; what it writes into and returns stays the tensor that was given."""
    if op is torch.ops.aten._copy_from.default:
        _host(args[1]).copy_(_host(args[0]))
        return args[1]
    given = {id(_host(x)): x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
    host_args, host_kwargs = pytree.tree_map(_host, (args, kwargs))
    results = op(*host_args, **host_kwargs)
    return pytree.tree_map_only(torch.Tensor, lambda x: given[id(x)] if id(x) in given else _placed(x), results)


_FALLBACK = torch.library.Library("_", "IMPL")
_FALLBACK.fallback(_run, "PrivateUse1")
_EXPLICIT = torch.library.Library("aten", "IMPL")
_ARANGE = [getattr(torch.ops.aten.arange, overload) for overload in ("default", "start", "start_step")]
_ATEN = torch.ops.aten
for _op in (*_ARANGE, _ATEN.matmul.default, _ATEN.constant_pad_nd.default, _ATEN.repeat.default):
    # Their own definitions write into views, or into memory whose size they change.
    _EXPLICIT.impl(_op, lambda *args, _op=_op, **kwargs: _run(_op, *args, **kwargs), "PrivateUse1")
