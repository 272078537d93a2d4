"""Counts the operators that torch runs, and those that make the host wait for its device."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::bincount",
    "aten::repeat_interleave",
}
NO_WORK = {
    "aten::_unsafe_view",
    "aten::lift_fresh",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
}


class Dispatched(TorchDispatchMode):
    """Counts operators by name.

    Attributes:
        operators: all but views and allocations. A GPU launches a kernel for each.
        waits: those that make the host wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if not func.is_view and name not in NO_WORK:
            self.operators[name] += 1
        is_indexing = name.startswith(("aten::index", "aten::_index_put"))
        if name in WAITS or (is_indexing and has_mask(args[1])):
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


def has_mask(indices) -> bool:
    """Whether one of the indices is a mask."""
    if not isinstance(indices, list | tuple):
        return False
    masks = (torch.bool, torch.uint8)
    return any(i is not None and i.dtype in masks for i in indices)
