"""What one training step did: its losses over all ranks, learning rate, gradient norm and speed.

The host reads these values one step late, so that it does not wait for the device inside a step.
"""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from evspan.pipeline.engine.adam import Update
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
        """Whether the micro-batch counts: its loss is finite on all ranks."""
        return math.isfinite(self.total)


class MicroBatchReport(NamedTuple):
    """One forward and backward.

    metrics: on the device, as of `MicroBatchSum.metrics`. gradients: as in StepReport.
    """

    metrics: Tensor
    gradients: dict[str, Tensor]

    @property
    def losses(self) -> LossSummary:
        """The host waits for the device."""
        return loss_summary(self.metrics.tolist())


class StepReport(NamedTuple):
    """One optimizer step, as the trainer passes it to its step callback.

    step: its number, from 1.
    losses: of its last micro-batch.
    learning_rate: of the first parameter group, after the step.
    gradient_norm: over all parameters, before clipping; of the last update that was applied.
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


# One value of a micro-batch's all-reduce counts the ranks that were asked to stop. In the same
# value, each rank without data adds NO_DATA, and each that is writing a checkpoint adds SAVING.
# Where it is 0 or below 1, the sum of SAVING is exact.
NO_DATA = 2.0**20
SAVING = 2.0**-20


class MicroBatchSum:
    """The one all-reduce of a micro-batch's loss. It also counts the ranks that were asked to stop.

    `detection_loss` calls it, with its counts and sums.

    Args:
        stop_requested: whether this rank was asked to stop.
        has_data: False: this rank has left off waiting for its frames. The loss becomes NaN on all
            ranks, so the micro-batch changes nothing on any of them.
        is_saving: whether this rank is still writing a checkpoint.
    """

    def __init__(
        self, *, stop_requested: bool, has_data: bool = True, is_saving: bool = False
    ) -> None:
        self.stop_requested = stop_requested
        self.has_data = has_data
        self.is_saving = is_saving
        self.stops: Tensor | None = None  # () number of ranks, after the call

    def __call__(self, values: Tensor) -> Tensor:
        """(n,) -> (n,), the sum over ranks. A collective."""
        stops = float(self.stop_requested)
        if not self.has_data:
            values = torch.full_like(values, torch.nan)
            stops = NO_DATA
        stops += SAVING * self.is_saving
        # Made on the device: a Python number would be copied there, and the host would wait.
        flag = torch.full((1,), stops, dtype=values.dtype, device=values.device)
        summed = sum_over_ranks(torch.cat((values, flag)), name="sums of the loss")
        self.stops = summed[-1]
        return summed[:-1]

    def metrics(self, losses: Losses) -> Tensor:
        """The same on every rank, and still on the device.

        Args:
            losses: what `detection_loss` returned.

        Returns:
            (6,): total, iou, objectness, classes, positives, number of ranks that were asked to
            stop (NO_DATA or more: a rank has no data; a fraction: ranks are writing a checkpoint).
        """
        assert self.stops is not None
        parts = torch.stack((losses.iou, losses.objectness, losses.classes))
        counts = torch.stack((losses.positives, self.stops))
        return torch.cat((parts.sum(0, keepdim=True), parts, counts))


def loss_summary(metrics: Sequence[float]) -> LossSummary:
    """From the six values of `MicroBatchSum.metrics`."""
    return LossSummary(*metrics[:5])


class StepValues(NamedTuple):
    """The values of one step that the host needs.

    losses: of every micro-batch. stop: whether any rank was asked to stop. no_data: whether any
    rank had no data, so that the step is to be left out. saving: whether any rank was writing a
    checkpoint at the last micro-batch; unknown where `stop`. gradient_norm, applied: of the update.
    """

    losses: list[LossSummary]
    stop: bool
    no_data: bool
    saving: bool
    gradient_norm: float
    applied: bool


class PendingValues:
    """The values of a step on their way to the host.

    Args:
        metrics: of every micro-batch, as of `MicroBatchSum.metrics`.
        update: of the step.
    """

    def __init__(self, metrics: Sequence[Tensor], update: Update) -> None:
        self.micro_batches = len(metrics)
        on_device = torch.cat(
            [
                *metrics,
                update.gradient_norm.reshape(1).to(metrics[0]),
                update.applied.reshape(1).to(metrics[0]),
            ]
        )
        self.copied: torch.cuda.Event | None = None
        if on_device.device.type == "cpu":
            self.values = on_device
        else:
            self.values = torch.empty(on_device.shape, dtype=on_device.dtype, pin_memory=True)
            self.values.copy_(on_device, non_blocking=True)
            self.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's
            self.copied.record()

    def read(self) -> StepValues:
        """Waits until the device has computed the values."""
        if self.copied is not None:
            self.copied.synchronize()
        *metrics, gradient_norm, applied = self.values.tolist()
        size = len(metrics) // self.micro_batches
        parts = [metrics[i * size : (i + 1) * size] for i in range(self.micro_batches)]
        return StepValues(
            [loss_summary(part) for part in parts],
            any(part[5] >= 1 for part in parts),
            any(part[5] >= NO_DATA for part in parts),
            parts[-1][5] % 1 > 0,
            gradient_norm,
            bool(applied),
        )


class Throughput(NamedTuple):
    """Since the last reading. data_wait_fraction: of the time, spent waiting for batches."""

    frames_per_s: float
    data_wait_fraction: float
    seconds: float


class ThroughputMeter:
    """Counts frames, and splits the time of training into waiting for data and the rest."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.started = time.perf_counter()
        self.waited_s = 0.0
        self.paused_s = 0.0
        self.frames = 0

    def add_wait(self, since: float) -> None:
        """Counts the time from `since` (time.perf_counter()) until now as waiting."""
        self.waited_s += time.perf_counter() - since

    def add_pause(self, since: float) -> None:
        """The time from `since` (time.perf_counter()) until now is no training, and is left out."""
        self.paused_s += time.perf_counter() - since

    def add_frames(self, frames: int) -> None:
        """Counts frames of all ranks."""
        self.frames += frames

    def read(self) -> Throughput:
        """Since the last call; starts again."""
        seconds = max(time.perf_counter() - self.started - self.paused_s, 1e-9)
        throughput = Throughput(self.frames / seconds, self.waited_s / seconds, seconds)
        self._reset()
        return throughput
