"""What a rank takes of its machine, and what all of them take together."""

import math
import resource
import sys
from pathlib import Path

import torch
from evspan.pipeline.parallel.reductions import gather_over_ranks

OF_THE_MEAN_RANK = {
    "speed/exchange_fraction",
    "speed/gpu_busy_fraction",
}  # ranks wait for each other at different places


class Resources:
    """What this process holds, and how busy its GPU is."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.busy_is_known = device, True

    def read(self) -> dict[str, float]:
        """NaN: not known."""
        told = {"memory/resident_gib": resident_bytes() / 2**30}
        if self.device.type == "cuda":
            told["memory/gpu_gib"] = torch.cuda.memory_reserved(self.device) / 2**30
            told["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            told["speed/gpu_busy_fraction"] = self._busy()
        return told

    def _busy(self) -> float:
        if self.busy_is_known:
            try:
                return torch.cuda.utilization(self.device) / 100
            except Exception:  # the driver's library or its Python package is not there: a curve less is no reason to stop
                self.busy_is_known = False
        return math.nan


def over_ranks(told: dict[str, float], device: torch.device) -> dict[str, float]:
    """Of the rank that has most, or of the mean rank; what no rank knows is left out. All ranks call it, with the same names."""
    parts = gather_over_ranks(
        torch.tensor([*told.values()], dtype=torch.float64, device=device)
    ).cpu()
    out = {}
    for name, values in zip(told, parts.T, strict=True):
        known = values[~values.isnan()]
        if len(known):
            out[name] = float(known.mean() if name in OF_THE_MEAN_RANK else known.max())
    return out


def resident_bytes() -> int:
    """Of this process: now on Linux, at most so far elsewhere."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10
