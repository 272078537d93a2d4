"""Times work on a device, and counts what it launches, copies and waits for."""

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaGraphLaunch",
    "cudaMemsetAsync",
)


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


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


def counts(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Launches, copies, waits and busy milliseconds of a GPU; on a CPU operators and waits."""
    if device.type != "cuda":
        from support.dispatched import Dispatched

        with Dispatched() as dispatched:
            work()
        return {
            "launches": dispatched.operators.total(),
            "waits": dispatched.waits.total(),
        }
    from torch.profiler import ProfilerActivity, profile

    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        synchronize(device)
    calls: Counter[str] = Counter()
    busy_us = 0.0
    for event in profiler.key_averages():
        calls[event.key] += event.count
        if event.device_type == torch.autograd.DeviceType.CUDA:
            busy_us += event.self_device_time_total
    own_synchronize = 1
    return {
        "launches": sum(calls[name] for name in LAUNCHES),
        "copies": calls["cudaMemcpyAsync"],
        "waits": calls["cudaStreamSynchronize"]
        + calls["cudaEventSynchronize"]
        + max(0, calls["cudaDeviceSynchronize"] - own_synchronize),
        "kernel_ms": busy_us / 1000,
    }


def wait_places(work: Callable[[], object]) -> dict[str, int]:
    """Where the host waits for the GPU: "file:line" -> times, the ten most frequent."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{Path(warning.filename).name}:{warning.lineno}"
        for warning in caught
        if "ynchroniz" in str(warning.message)
    )
    return dict(places.most_common(10))


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
