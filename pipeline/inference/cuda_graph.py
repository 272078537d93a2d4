"""Captures work with static shapes and memory as a CUDA graph, which one launch repeats."""

from collections.abc import Callable
from typing import TypeVar

import torch
from evspan.conf.errors import UserError

T = TypeVar("T")
WARM_UP = 3  # runs before the capture: libraries choose kernels and allocate in the first ones


def require_cuda_graphs(device: torch.device) -> None:
    """Checks that CUDA graphs can be captured on a device.

    Raises:
        UserError: they cannot.
    """
    if device.type != "cuda":
        raise UserError(
            f"CUDA graphs need a GPU, the detector is on {device}. Give a CUDA device, or leave "
            "CUDA graphs out: the detections are the same"
        )


def capture(work: Callable[[], T], device: torch.device) -> tuple[Callable[[], object], T]:
    """Runs `work` a few times, and captures it.

    Args:
        work: reads its inputs from memory that stays, and asks the device for no value.

    Returns:
        A function that repeats the work, and its outputs, which every repetition overwrites.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = work()
        return graph.replay, outputs
