"""Times work on a device, and counts what it launches, copies and waits for."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
from evspan.pipeline.benchmark.operations import Operations, count_operations
from evspan.pipeline.benchmark.timing import synchronize
from torch import Tensor


def seconds(
    work: Callable[[], object], device: torch.device, *, repeats: int, warm_up: int = 2
) -> float:
    """Median time of one call, until the device has finished."""
    for _ in range(warm_up):
        work()
    times = []
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return median(times)


def counts(work: Callable[[], object], device: torch.device) -> dict[str, float | str]:
    """What one run of `work` asks of the device, as values of a row."""
    return row_values(count_operations(work, device))


def row_values(operations: Operations) -> dict[str, float | str]:
    """Counted operations as values of a row."""
    values: dict[str, float | str] = {
        "launches": operations.launches,
        "copies": operations.copies,
        "waits": operations.waits,
        "busy_ms": operations.busy_ms,
        "in_products": operations.product_fraction,
    }
    if operations.wait_places:
        values["waits_at"] = str(dict(operations.wait_places))
    return values


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Sets whether float32 products on a GPU may round to TF32."""
    matmul = torch.backends.cuda.matmul
    cudnn = torch.backends.cudnn
    before = (matmul.allow_tf32, cudnn.allow_tf32)
    matmul.allow_tf32 = enabled
    cudnn.allow_tf32 = enabled
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference, divided by that of `expected`."""
    difference = actual.detach().double().cpu() - expected.detach().double().cpu()
    return float(difference.norm() / expected.detach().double().norm().cpu().clamp(min=1e-12))


def error_text(error: BaseException) -> str:
    """Type and message of an error in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def peak_gib(device: torch.device) -> float:
    """The most memory of the GPU that tensors have taken since `reset_peak`; 0 on a CPU."""
    if device.type != "cuda":
        return 0.0
    return torch.cuda.max_memory_allocated(device) / 2**30


def reset_peak(device: torch.device) -> None:
    """Starts a new measurement of `peak_gib`, and returns cached memory to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
