"""DeepSpeed on the emulated GPU."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.comm import comm
from deepspeed.utils import groups
from evspan.pipeline.engine.deepspeed_engine import DeepSpeedEngine
from support.emulated_device import Event, Stream, current


class EmulatedAccelerator(CPU_Accelerator):
    """Answers as DeepSpeed's CUDA accelerator does, without CUDA's compiled operators."""

    def is_synchronized_device(self) -> bool:
        """The host runs ahead of a GPU."""
        return False

    def device_name(self, device_index: int | None = None) -> str:
        """cuda or cuda:N."""
        return "cuda" if device_index is None else f"cuda:{device_index}"

    def device(self, device_index: int | None = None) -> Any:
        """A context."""
        return Stream()

    def current_device(self) -> int:
        """0."""
        return 0

    def current_device_name(self) -> str:
        """cuda:0."""
        return "cuda:0"

    def device_count(self) -> int:
        """One."""
        return 1

    def synchronize(self, device_index: int | None = None) -> None:
        """Counts a wait."""
        current().wait("DeepSpeed's synchronize")

    def Stream(self, *args: Any, **kwargs: Any) -> Stream:  # noqa: N802  DeepSpeed's name
        """A new stream."""
        return Stream()

    def stream(self, stream: Any) -> Any:
        """The stream as a context."""
        return stream

    def current_stream(self, device_index: int | None = None) -> Stream:
        """The one stream."""
        return Stream()

    def default_stream(self, device_index: int | None = None) -> Stream:
        """The one stream."""
        return Stream()

    def Event(self, **kwargs: Any) -> Event:  # noqa: N802  DeepSpeed's name
        """A new event."""
        return Event()

    def is_fp16_supported(self) -> bool:
        """Yes."""
        return True

    def supported_dtypes(self) -> list[torch.dtype]:
        """Those of a GPU."""
        return [torch.float, torch.half, torch.bfloat16]

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on the device."""
        return bool(tensor.is_cuda)


_real_init = DeepSpeedEngine.__init__


def _init_on_device(self, model, config, world, **kwargs) -> None:
    """Moves the model before the optimizer is made: unlike on CUDA, a module that moves to the
    emulated device has other parameters than before."""
    _real_init(self, model.to(world.device), config, world, **kwargs)


@contextmanager
def deepspeed_on_emulated_gpu() -> Iterator[None]:
    """While open, DeepSpeed computes on the emulated GPU, in the process group that is open."""
    with ExitStack() as stack:
        accelerator = EmulatedAccelerator()
        stack.enter_context(mock.patch.object(real_accelerator, "ds_accelerator", accelerator))
        # It keeps the process groups that it has used.
        stack.enter_context(mock.patch.object(comm, "cdb", None))
        for name, value in list(vars(groups).items()):
            if name.endswith(("_GROUP", "_GROUP_RANKS")):
                unused = {} if isinstance(value, dict) else None
                stack.enter_context(mock.patch.object(groups, name, unused))
        stack.enter_context(mock.patch.object(DeepSpeedEngine, "__init__", _init_on_device))
        yield
