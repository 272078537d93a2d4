"""What one training step did: its losses over all ranks, learning rate, gradient norm and speed."""

import math
import time
from typing import NamedTuple

import torch
from evspan.pipeline.model.loss import Losses
from evspan.pipeline.parallel.reductions import sum_over_ranks
from torch import Tensor


class LossSummary(NamedTuple):
    """Losses of one micro-batch over all ranks, divided by its positives.

    total: the sum of the next three. iou: includes its factor 5. positives: predictions that are
    assigned to a box.
    """

    total: float
    iou: float
    objectness: float
    classes: float
    positives: float

    @property
    def is_finite(self) -> bool:
        """Whether every rank may run backward."""
        return math.isfinite(self.total)


class MicroBatchReport(NamedTuple):
    """One forward and backward.

    stop: whether any rank was asked to stop. gradients: as in StepReport.
    """

    losses: LossSummary
    stop: bool
    gradients: dict[str, Tensor]


class StepReport(NamedTuple):
    """One optimizer step, as the trainer passes it to its step callback.

    step: its number, from 1.
    losses: of its last micro-batch.
    learning_rate: of the first parameter group, after the step.
    gradient_norm: over all parameters, before clipping.
    gradients: parameter name -> float32 on the CPU, over all ranks, before clipping; only in the
        trainer's `gradient_steps`, else empty.
    stop: whether any rank was asked to stop.
    started: time.perf_counter() when its first micro-batch was on the device. On a GPU the step may
        still be running when the callback is called.
    """

    step: int
    losses: LossSummary
    learning_rate: float
    gradient_norm: float
    gradients: dict[str, Tensor]
    stop: bool
    started: float


class MicroBatchSum:
    """The one all-reduce of a micro-batch's loss. It also counts the ranks that were asked to stop.

    `detection_loss` calls it, with its counts and sums.

    Args:
        stop_requested: whether this rank was asked to stop.
    """

    def __init__(self, *, stop_requested: bool) -> None:
        self.stop_requested = stop_requested
        self.stops: Tensor | None = None  # () number of ranks, after the call

    def __call__(self, values: Tensor) -> Tensor:
        """(n,) -> (n,), the sum over ranks. A collective."""
        # Made on the device: a Python number would be copied there, and the host would wait.
        flag = torch.full(
            (1,), float(self.stop_requested), dtype=values.dtype, device=values.device
        )
        summed = sum_over_ranks(torch.cat((values, flag)))
        self.stops = summed[-1]
        return summed[:-1]

    def read(self, losses: Losses) -> tuple[LossSummary, bool]:
        """The losses, and whether any rank was asked to stop: the same on every rank.

        This is the one place in a step where the host waits for the device.

        Args:
            losses: what `detection_loss` returned.
        """
        assert self.stops is not None
        parts = torch.stack((losses.iou, losses.objectness, losses.classes))
        counts = torch.stack((losses.positives, self.stops))
        values = torch.cat((parts.sum(0, keepdim=True), parts, counts)).tolist()
        total, iou, objectness, classes, positives, stops = values
        return LossSummary(total, iou, objectness, classes, positives), stops > 0


class Throughput(NamedTuple):
    """Since the last reading. data_wait_fraction: of the time, spent waiting for batches."""

    frames_per_s: float
    data_wait_fraction: float
    seconds: float


class ThroughputMeter:
    """Counts frames, and splits time into waiting for data and the rest."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.started = time.perf_counter()
        self.waited_s = 0.0
        self.frames = 0

    def add_wait(self, since: float) -> None:
        """Counts the time from `since` (time.perf_counter()) until now as waiting."""
        self.waited_s += time.perf_counter() - since

    def add_frames(self, frames: int) -> None:
        """Counts frames of all ranks."""
        self.frames += frames

    def read(self) -> Throughput:
        """Since the last call; starts again."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        throughput = Throughput(self.frames / seconds, self.waited_s / seconds, seconds)
        self._reset()
        return throughput
