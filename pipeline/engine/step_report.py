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


def reduce_over_ranks(losses: Losses, *, stop_requested: bool) -> tuple[LossSummary, bool]:
    """The losses over all ranks, and whether any rank was asked to stop. A collective.

    One small sum carries both, so all ranks decide alike. Reading its result is the one place in a
    step where the host waits for the device.

    Args:
        losses: of this rank, 0-dim float tensors.
    """
    local = torch.stack(
        [
            losses.total,
            losses.iou,
            losses.objectness,
            losses.classes,
            losses.total.new_tensor(float(stop_requested)),
        ]
    )
    summed = sum_over_ranks(local.detach())
    positives = losses.positives.reshape(1).to(summed)  # over all ranks already
    values = torch.cat((summed, positives)).tolist()
    total, iou, objectness, classes, stops, num_positives = values
    return LossSummary(total, iou, objectness, classes, num_positives), stops > 0


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
