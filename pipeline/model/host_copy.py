"""Copies of device tensors in host memory, made while the host goes on."""

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor in host memory.

    On a GPU the copy is queued behind the work that computes the tensor, into pinned memory, and
    the host waits only in `wait`. On other devices `wait` copies. A CPU tensor is not copied.
    """

    def __init__(self, source: Tensor) -> None:
        self._tensor = source
        self._copied: torch.cuda.Event | None = None
        if source.device.type == "cuda":
            self._tensor = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._tensor.copy_(source, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # of torch
            self._copied.record(torch.cuda.current_stream(source.device))

    def wait(self) -> Tensor:
        """The tensor on the CPU. Waits until the device has computed and copied it."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        self._tensor = self._tensor.cpu()
        return self._tensor
