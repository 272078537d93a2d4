"""The time of each step of a rank by part, without waiting for the other ranks."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import Any

import numpy as np
import torch

SAMPLES = 8  # steps of a log interval that a GPU is measured in
FIRST_STEPS = 10  # of an attempt, all of which are measured
QUANTILES = (0.1, 0.5, 0.9)


class StepPart(Enum):
    """What a rank does in a step."""

    data = "data"  # waits for its loader, moves frames to the device
    forward = "forward"  # with the loss
    backward = "backward"
    update = "update"  # optimizer, average
    exchange = "exchange"  # collectives: moves data between ranks, waits for them


OWN_PARTS = tuple(part for part in StepPart if part is not StepPart.exchange)


@dataclass(frozen=True)
class StepTimes:
    """Some steps of a rank.

    Attributes:
        steps: that were measured.
        own_ms: QUANTILES over the steps of the time without `exchange`; NaN without steps.
        parts_ms: the median of each part, in the order of StepPart; NaN without steps.
    """

    steps: int
    own_ms: tuple[float, ...]
    parts_ms: tuple[float, ...]

    @classmethod
    def of(cls, steps: "Sequence[dict[StepPart, float]]") -> "StepTimes":
        """steps: of each the ms by part."""
        if not steps:
            return cls(0, (np.nan,) * len(QUANTILES), (np.nan,) * len(StepPart))
        table = np.array([[step.get(part, 0.0) for part in StepPart] for step in steps])
        own = table[:, : len(OWN_PARTS)].sum(1)
        quantiles = np.quantile(own, QUANTILES)
        medians = np.median(table, axis=0)
        return cls(len(steps), tuple(quantiles.tolist()), tuple(medians.tolist()))

    def to_numbers(self) -> list[float]:
        """All values in one order, for a collective."""
        return [float(self.steps), *self.own_ms, *self.parts_ms]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> "StepTimes":
        """The inverse of `to_numbers`."""
        own = tuple(numbers[1 : 1 + len(QUANTILES)])
        return cls(int(numbers[0]), own, tuple(numbers[1 + len(QUANTILES) :]))

    @property
    def median_ms(self) -> float:
        """Of the time without `exchange`."""
        return self.own_ms[QUANTILES.index(0.5)]

    def part_ms(self, part: StepPart) -> float:
        """Its median."""
        return self.parts_ms[list(StepPart).index(part)]


class StepClock:
    """Splits the steps of this rank into parts.

    On a CPU the marks are times of the host, in every step. On a GPU they are events in the current
    stream, in some steps of each log interval; they are read after the host has waited for the
    values of the last step anyway, so that it never waits for them.

    Args:
        log_every: steps of a log interval.
        enabled: False: nothing is measured.
    """

    def __init__(self, device: torch.device, *, log_every: int, enabled: bool = True) -> None:
        self.on_gpu = device.type == "cuda"
        self.enabled = enabled
        self.every = max(1, log_every // SAMPLES) if self.on_gpu else 1
        self.steps = 0  # of this attempt
        self.is_measuring = False
        self.part: StepPart | None = None
        self.depth = 0  # of collectives inside of collectives
        self.marks: list[tuple[StepPart | None, Any]] = []  # of the current step
        self.pending: list[list[tuple[StepPart | None, Any]]] = []  # steps of a GPU
        self.measured: list[dict[StepPart, float]] = []

    def start_step(self) -> None:
        """A step begins."""
        self.steps += 1
        is_sampled = self.steps <= FIRST_STEPS or self.steps % self.every == 0
        self.is_measuring = self.enabled and is_sampled
        self.marks = []

    def begin(self, part: StepPart) -> None:
        """The rank does this from now on."""
        self.part = part
        self._mark(part)

    def end_step(self) -> None:
        """All work of the step is queued."""
        if not self.is_measuring:
            return
        self._mark(None)
        self.is_measuring = False
        if self.on_gpu:
            self.pending.append(self.marks)
        else:
            self.measured.append(_parts_ms(self.marks, _host_ms))
        self.marks = []

    def begin_collective(self) -> None:
        """See CollectiveClock."""
        self.depth += 1
        if self.depth == 1:
            self._mark(StepPart.exchange)

    def end_collective(self) -> None:
        """See CollectiveClock."""
        self.depth -= 1
        if self.depth == 0:
            self._mark(self.part)

    def _mark(self, part: StepPart | None) -> None:
        if not self.is_measuring:
            return
        mark: Any
        if self.on_gpu:
            event: Any = torch.cuda.Event
            mark = event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append((part, mark))

    def read(self) -> StepTimes:
        """The steps since the last call. Those that a GPU has not finished are left for later."""
        unfinished = []
        for marks in self.pending:
            _, last = marks[-1]
            if last.query():
                self.measured.append(_parts_ms(marks, _device_ms))
            else:
                unfinished.append(marks)
        self.pending = unfinished
        times = StepTimes.of(self.measured)
        self.measured = []
        return times


def _parts_ms(
    marks: Sequence[tuple[StepPart | None, Any]], elapsed_ms: Any
) -> dict[StepPart, float]:
    parts: dict[StepPart, float] = defaultdict(float)
    for (part, begin), (_, end) in pairwise(marks):
        if part is not None:
            parts[part] += elapsed_ms(begin, end)
    return dict(parts)


def _host_ms(begin: float, end: float) -> float:
    return 1000 * (end - begin)


def _device_ms(begin: Any, end: Any) -> float:
    return float(begin.elapsed_time(end))
