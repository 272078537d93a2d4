"""What torch was asked to run: operators that do work, and those that make the host wait for its device."""

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
    """operators: all but views and bare allocations, by name; a GPU pays a launch for each. waits: of the host, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if not func.is_view and name not in NO_WORK:
            self.operators[name] += 1
        masked = (
            name.startswith(("aten::index", "aten::_index_put"))
            and isinstance(args[1], list | tuple)
            and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        )
        if masked or name in WAITS:
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))
