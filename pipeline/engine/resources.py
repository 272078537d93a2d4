"""Memory and GPU utilization of a rank, and of all ranks together."""

import ctypes
import math
import resource
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import psutil
import torch
from evspan.pipeline.parallel.reductions import gather_over_ranks
from torch import Tensor

# Averaged over ranks, which wait for each other at different places. The others are maxima.
MEAN_METRICS = {
    "speed/exchange_fraction",
    "speed/gpu_busy_fraction",
    "speed/mfu",
    "speed/model_tflops_per_s",
}


class Resources:
    """Reads what this process uses."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.has_utilization = True

    def read(self) -> dict[str, float]:
        """TensorBoard tag -> GiB or fraction. NaN: not available."""
        metrics = {"memory/resident_gib": resident_bytes() / 2**30}
        if self.device.type == "cuda":
            metrics["memory/gpu_gib"] = torch.cuda.memory_reserved(self.device) / 2**30
            metrics["memory/gpu_peak_gib"] = peak_bytes(self.device) / 2**30
            metrics["speed/gpu_busy_fraction"] = self._utilization()
        return metrics

    def _utilization(self) -> float:
        if self.has_utilization:
            try:
                return torch.cuda.utilization(self.device) / 100
            except Exception:
                # NVML or its Python package is missing. The curve is then missing too.
                self.has_utilization = False
        return math.nan


def over_ranks(metrics: dict[str, float], device: torch.device) -> dict[str, float]:
    """The maximum over ranks, or the mean of MEAN_METRICS. A collective.

    Args:
        metrics: with the same keys on all ranks. NaN values are ignored.

    Returns:
        The same on every rank, without metrics that are NaN on all ranks.
    """
    return combine(metrics, gather_numbers([*metrics.values()], device))


def gather_numbers(numbers: Sequence[float], device: torch.device) -> Tensor:
    """(ranks, n) float64 on the CPU: the numbers of all ranks, on every rank. A collective."""
    local = torch.tensor(numbers, dtype=torch.float64, device=device)
    return gather_over_ranks(local, name="speed and memory of the ranks").cpu()


def combine(names: Iterable[str], by_rank: Tensor) -> dict[str, float]:
    """`over_ranks` of what was gathered. by_rank: (ranks, n), in the order of the names."""
    combined = {}
    for name, values in zip(names, by_rank.T, strict=True):
        known = values[~values.isnan()]
        if len(known):
            reduced = known.mean() if name in MEAN_METRICS else known.max()
            combined[name] = float(reduced)
    return combined


def resident_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has used on a device; on a CPU, resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # psutil has no peak on Linux, and ru_maxrss includes the process that started this one.
        status = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10  # bytes on macOS, else KiB
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["VmHWM"].split()[0]) << 10


def reset_peak_bytes(device: torch.device) -> None:
    """Restarts the measurement of `peak_bytes`."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:  # glibc
        malloc_trim(0)  # memory that was freed before must not count
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except OSError:
        pass  # the peak is then that of the process so far
