"""Copies of tensors in the host's memory, for which the host does not wait."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class CopyToHost(Protocol):
    """Copies a tensor to the CPU."""

    def __call__(self, tensor: Tensor, *, is_temporary: bool = False) -> Tensor:
        """The copy, detached and contiguous, on the CPU.

        Args:
            is_temporary: nobody changes the tensor later, so on a CPU it may be returned itself.
        """


def copy_now(tensor: Tensor, *, is_temporary: bool = False) -> Tensor:
    """A `CopyToHost` whose result may be read at once: the host waits for the device."""
    tensor = tensor.detach()
    if tensor.device.type != "cpu":
        return tensor.cpu().contiguous()
    return tensor.contiguous() if is_temporary else _clone(tensor)


def no_copy(tensor: Tensor, *, is_temporary: bool = False) -> Tensor:
    """A `CopyToHost` of a rank that takes part in the collectives only: the tensor as it is."""
    return tensor.detach()


class HostCopies:
    """The copies of one checkpoint. An instance is a `CopyToHost` that does not wait.

    On a GPU they are queued behind the work that the device has, and ahead of the next step, which
    may then change the tensors. Their memory is page-locked; torch keeps it for the next checkpoint
    once they are released. On a CPU they are made at once.
    """

    def __init__(self) -> None:
        self._copied: torch.cuda.Event | None = None

    def __call__(self, tensor: Tensor, *, is_temporary: bool = False) -> Tensor:
        """Queues a copy. Its values are there after `wait`."""
        tensor = tensor.detach()
        if tensor.device.type == "cpu":
            return copy_now(tensor, is_temporary=is_temporary)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        # Each copy has the event recorded again, behind itself.
        if self._copied is None:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
        self._copied.record()
        return host

    def wait(self) -> None:
        """Waits until the device has made all copies. In any thread."""
        if self._copied is not None:
            self._copied.synchronize()


def copy_as_float32(tensors: Mapping[str, Tensor], copy: CopyToHost) -> dict[str, Tensor]:
    """Copies of tensors by name, floating ones as float32.

    Those of a dtype and a device are copied as one flat tensor, of which the results are views.
    """
    groups: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.dtype, tensor.device), {})[name] = tensor.detach()
    copies: dict[str, Tensor] = {}
    for (dtype, _), group in groups.items():
        flat = torch.cat([tensor.reshape(-1) for tensor in group.values()])
        if dtype.is_floating_point:
            flat = flat.float()
        host = copy(flat, is_temporary=True)
        first = 0
        for name, tensor in group.items():
            copies[name] = host[first : first + tensor.numel()].view(tensor.shape)
            first += tensor.numel()
    return {name: copies[name] for name in tensors}


def _clone(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
