"""Finds steps whose loss is far above those before it, and records what they read.

A spike is an event of the run's history:

    {"event": "spike", "step": 130, "loss": 41.2, "mean": 3.1, "sigma": 0.5, "sigmas": 76.2,
     "steps": 128, "micro_batch": 1,
     "batch": [{"lane": 0, "recording": "a", "file": "train/00000.h5", "frame": 120, "frames": 5}]}

Its batch is that of all ranks: which frames a lane reads is a pure function of seed and step, so no
rank has to be asked. `loss` is null where it is not finite.
"""

import logging
import math
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from evspan.conf.schema.training import TrainingConfig
from evspan.conf.text import plural
from evspan.pipeline.data.datasets import Dataset
from evspan.pipeline.data.plan import SamplingPlan
from evspan.pipeline.history import SPIKE, append_observation

logger = logging.getLogger(__name__)
RECENT_LOSSES = "recent_losses"  # key of a checkpoint's meta.json
MOST_SPIKES = 100  # of an attempt that are recorded
LANES_SHOWN = 4  # in the log


class Deviation(NamedTuple):
    """How far a loss is from those before it: `sigmas` times `sigma` above `mean`."""

    mean: float
    sigma: float
    sigmas: float


class LossWindow:
    """The losses of the last steps, and whether another one is far above them.

    Args:
        steps: of the window; a shorter one judges no loss.
        sigmas: a loss is a spike if it is more standard deviations above the mean; 0: none is.
    """

    def __init__(self, steps: int, sigmas: float) -> None:
        self.losses: deque[float] = deque(maxlen=steps)
        self.sigmas = sigmas

    def add(self, loss: float) -> Deviation | None:
        """Compares a loss with the window, then adds it, if it is finite.

        Returns:
            How far it is above the mean, if that is a spike. The standard deviation is that of the
            window's losses (divided by their number). Where it is 0, no loss is a spike.
        """
        deviation = self._deviation(loss)
        if math.isfinite(loss):
            self.losses.append(loss)
        is_spike = deviation is not None and deviation.sigmas > self.sigmas
        return deviation if is_spike else None

    def _deviation(self, loss: float) -> Deviation | None:
        if not self.sigmas or len(self.losses) < (self.losses.maxlen or 0):
            return None
        window = np.array(self.losses)
        mean = float(window.mean())
        sigma = float(window.std())
        if not sigma or not math.isfinite(loss):
            return None
        return Deviation(mean, sigma, (loss - mean) / sigma)


class LossSpikes:
    """Records the spikes of a run. Rank 0 does; the others do nothing.

    The window is part of the checkpoint, so a run that continues finds the same spikes as one that
    was never interrupted. Steps that are repeated are recorded again; readers keep one per step.
    """

    def __init__(
        self,
        run_dir: Path,
        config: TrainingConfig,
        plan: SamplingPlan,
        dataset: Dataset,
        *,
        enabled: bool,
    ) -> None:
        self.run_dir = run_dir
        self.config = config
        self.plan = plan
        self.dataset = dataset
        self.enabled = enabled and config.spike_sigmas > 0
        self.window = LossWindow(config.spike_window, config.spike_sigmas)
        self.recorded = 0

    def state(self) -> list[float]:
        """The window, for the checkpoint."""
        return list(self.window.losses)

    def resume(self, losses: object) -> None:
        """Continues with the window of a checkpoint; one of before has none."""
        if isinstance(losses, list):
            numbers = [loss for loss in losses if isinstance(loss, int | float)]
            self.window.losses.extend(float(loss) for loss in numbers if math.isfinite(loss))

    def add(self, step: int, losses: Sequence[float]) -> None:
        """Compares the loss of a step, and records it if it is a spike.

        Args:
            losses: of its micro-batches; the step's is their mean. Those that are not finite are
                recorded, and are not part of the mean.
        """
        if not self.enabled:
            return
        for number, loss in enumerate(losses, 1):
            if not math.isfinite(loss):
                self._record(step, number, None, None)
        finite = [loss for loss in losses if math.isfinite(loss)]
        if not finite:
            return
        mean = math.fsum(finite) / len(finite)
        deviation = self.window.add(mean)
        if deviation is not None:
            highest = max(finite)
            self._record(step, losses.index(highest) + 1, mean, deviation)

    def _record(
        self, step: int, micro_batch: int, loss: float | None, deviation: Deviation | None
    ) -> None:
        """micro_batch: of the step, from 1, whose recordings are listed."""
        self.recorded += 1
        if self.recorded > MOST_SPIKES:
            return
        index = (step - 1) * self.config.gradient_accumulation_steps + micro_batch - 1
        batch = [self._lane(lane, index) for lane in range(self.config.batch_size)]
        values: dict[str, Any] = {"step": step, "loss": loss}
        text = "loss is not finite"
        if deviation is not None:
            values.update(deviation._asdict(), steps=len(self.window.losses))
            text = (
                f"loss {loss:.4g} is {deviation.sigmas:.1f} sigma above the mean "
                f"{deviation.mean:.4g} of the last {plural(len(self.window.losses), 'step')}"
            )
        append_observation(self.run_dir, SPIKE, **values, micro_batch=micro_batch, batch=batch)
        shown = "; ".join(lane_texts(batch[:LANES_SHOWN]))
        more = len(batch) - LANES_SHOWN
        if more > 0:
            shown += f"; {plural(more, 'more lane')}"
        logger.warning("step %d: %s. Its batch: %s", step, text, shown)
        if self.recorded == MOST_SPIKES:
            logger.warning("further spikes of this attempt are not recorded")

    def _lane(self, lane: int, index: int) -> dict[str, Any]:
        """What a lane of all ranks reads in micro-batch `index` of the run."""
        chunk = self.plan.chunk(lane, index)
        recording = self.dataset.recordings[chunk.recording]
        return {
            "lane": lane,
            "recording": recording.name,
            "file": recording.file,
            "frame": chunk.first,
            "frames": chunk.frames,
        }


def lane_texts(batch: Iterable[dict[str, Any]]) -> list[str]:
    """'lane 0: a (train/00000.h5) from frame 120' for each lane of a spike's batch."""
    return [
        f"lane {lane['lane']}: {lane['recording']} ({lane['file']}) from frame {lane['frame']}"
        for lane in batch
    ]
