"""Times of the parts of repeated work, on the device's own clock where it is a GPU."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Spread:
    """Median, 5 % and 95 % of repeated measurements, in ms."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, values_ms: Sequence[float]) -> "Spread":
        """Of at least one measurement."""
        low, median, high = np.percentile(values_ms, [5, 50, 95]).tolist()
        return cls(median, low, high, len(values_ms))


class PartClock:
    """Splits a span of time into named parts.

    On a GPU the marks are events in the current stream: the host does not wait for them, and a part
    lasts until the device has finished it. Elsewhere they are times of the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Any]] = []

    def mark(self, part: str) -> None:
        """`part` begins, and the part before it ends; "": what follows is in no part."""
        if self.device.type == "cuda":
            event: Any = torch.cuda.Event
            mark = event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append((part, mark))

    def read_ms(self) -> dict[str, float]:
        """Milliseconds by part, in the order of their beginning; forgets the marks.

        On a GPU it waits until all marks are reached.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        parts: dict[str, float] = defaultdict(float)
        for (part, begin), (_, end) in zip(self.marks, self.marks[1:]):
            if part:
                parts[part] += self._elapsed_ms(begin, end)
        self.marks = []
        return dict(parts)

    def _elapsed_ms(self, begin: Any, end: Any) -> float:
        if self.device.type == "cuda":
            return float(begin.elapsed_time(end))
        return 1000 * float(end - begin)


def synchronize(device: torch.device) -> None:
    """Waits until a GPU has finished; returns at once for a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
