"""Counts what a piece of work asks of its device: operators or launches, copies, host waits."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from evspan.pipeline.benchmark.timing import synchronize
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaGraphLaunch",
    "cudaMemsetAsync",
)
COPIES = ("cudaMemcpyAsync", "cudaMemcpy")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")
WAIT_PLACES = 8  # in a report
WAIT_WARNING = "called a synchronizing CUDA operation"  # torch's
# Kernels, or a CPU's operators, that compute matrix products. What is left reads and writes memory.
GPU_PRODUCTS = re.compile(
    r"gemm|cutlass|xmma|nvjet|conv(?!ert)|wgrad|dgrad|fprop|flash|fmha|attention|rnn|lstm", re.I
)
CPU_PRODUCTS = re.compile(r"^aten::((b?add)?b?mm_?|addbmm_?|(add)?mv)$|conv(?!ert)|rnn|attention")

# Operators after which the host of a GPU waits for a value.
WAITING_OPERATORS = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::unique_dim",
}
ALLOCATIONS = {
    "aten::_unsafe_view",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::lift_fresh",
    "aten::new_empty",
    "aten::new_empty_strided",
}


@dataclass(frozen=True)
class Operations:
    """Of one piece of work.

    Attributes:
        launches: kernels on a GPU; on a CPU the operators, each of which a GPU would launch.
        on_gpu: whether a GPU was counted.
        copies: between host and GPU, and on it; 0 on a CPU.
        waits: times that the host waits for the device; on a CPU, operators that would make it.
        wait_places: "file:line" or operator -> times.
        busy_ms: the device computes.
        product_ms: of that, in matrix products, the rest being limited by memory.
    """

    launches: int
    on_gpu: bool
    copies: int
    waits: int
    wait_places: Mapping[str, int]
    busy_ms: float
    product_ms: float

    @property
    def product_fraction(self) -> float:
        """Of the time that the device computes."""
        return self.product_ms / self.busy_ms if self.busy_ms else 0.0


class OperatorCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Counts operators while it is open.

    Attributes:
        operators: by name, without views and allocations.
        waits: those that make the host of a GPU wait.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch does not annotate it
        self.operators: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func._schema.name
        if not func.is_view and name not in ALLOCATIONS:
            self.operators[name] += 1
        if makes_host_wait(name, args):
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


def makes_host_wait(name: str, args: tuple[Any, ...]) -> bool:
    """Whether the host of a GPU waits for an operator's result.

    Args:
        name: of the schema, such as aten::nonzero. args: of the call.
    """
    return name in WAITING_OPERATORS or _indexes_by_mask(name, args)


def _indexes_by_mask(name: str, args: tuple[Any, ...]) -> bool:
    """Whether an operator indexes by a mask, whose count the host has to know."""
    if not name.startswith(("aten::index", "aten::_index_put")) or len(args) < 2:
        return False
    indices = args[1] if isinstance(args[1], list | tuple) else []
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


def count_operations(
    work: Callable[[], object], device: torch.device, *, timed: bool = True
) -> Operations:
    """Runs `work` twice, once to count and once to time, and returns what one run does.

    Args:
        timed: False: on a CPU, count only; its times are then 0.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints when it starts and stops
    if device.type == "cuda":
        return _count_on_gpu(work, device)
    with OperatorCounter() as counter:
        work()
    times_ms: dict[str, float] = {}
    if timed:
        with profile(activities=[ProfilerActivity.CPU]) as trace:
            work()
        for event in trace.key_averages():
            times_ms[event.key] = event.self_cpu_time_total / 1000
    return Operations(
        launches=counter.operators.total(),
        on_gpu=False,
        copies=0,
        waits=counter.waits.total(),
        wait_places=dict(counter.waits.most_common(WAIT_PLACES)),
        busy_ms=sum(times_ms.values()),
        product_ms=products_ms(times_ms, CPU_PRODUCTS),
    )


def _count_on_gpu(work: Callable[[], object], device: torch.device) -> Operations:
    places = wait_places(work)
    nothing = _gpu_profile(lambda: None, device)
    return gpu_operations(_gpu_profile(work, device), nothing, places)


def _gpu_profile(work: Callable[[], object], device: torch.device) -> list[Any]:
    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        work()
        synchronize(device)
    return list(trace.key_averages())


def gpu_operations(
    events: Iterable[Any], of_nothing: Iterable[Any], places: Mapping[str, int]
) -> Operations:
    """From the averages of a GPU's profile.

    Args:
        events: calls of the host and kernels of the device, by name.
        of_nothing: of a profile in which nothing ran: the waits of measuring.
        places: of `wait_places`.
    """
    own = Counter({event.key: event.count for event in of_nothing})
    calls: Counter[str] = Counter()
    kernels_ms: dict[str, float] = {}
    for event in events:
        calls[event.key] += event.count
        is_kernel = event.device_type.name == "CUDA" and not _is_copy_or_label(event)
        if is_kernel:
            kernels_ms[event.key] = event.self_device_time_total / 1000
    return Operations(
        launches=sum(calls[name] for name in LAUNCHES),
        on_gpu=True,
        copies=sum(calls[name] for name in COPIES),
        waits=sum(max(0, calls[name] - own[name]) for name in WAITS),
        wait_places=places,
        busy_ms=sum(kernels_ms.values()),
        product_ms=products_ms(kernels_ms, GPU_PRODUCTS),
    )


def _is_copy_or_label(event: Any) -> bool:
    """Whether a row of the device's timeline is a copy, or a named region around kernels."""
    return event.key.startswith(("Memcpy", "Memset")) or getattr(event, "is_user_annotation", False)


def products_ms(times_ms: Mapping[str, float], products: re.Pattern[str]) -> float:
    """The time of those kernels, or operators, that compute matrix products."""
    return sum(time for name, time in times_ms.items() if products.search(name))


def wait_places(work: Callable[[], object]) -> dict[str, int]:
    """Where the host of a GPU waits in `work`: "file:line" -> times, the most frequent ones."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places: Counter[str] = Counter()
    for warning in caught:
        if WAIT_WARNING in str(warning.message):
            places[f"{Path(warning.filename).name}:{warning.lineno}"] += 1
    return dict(places.most_common(WAIT_PLACES))
