"""Times a training step of the real trainer by part, and counts what it launches."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evspan.pipeline.benchmark.operations import Operations, count_operations
from evspan.pipeline.benchmark.timing import PartClock, Spread, synchronize
from evspan.pipeline.data.batch import Batch
from evspan.pipeline.data.device_batches import device_batches, encodes_for
from evspan.pipeline.data.encoded import EncodedBatch
from evspan.pipeline.engine.resources import peak_bytes, reset_peak_bytes
from evspan.pipeline.engine.trainer import Trainer
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.flops import DetectorFlops, FrameCounts, ModelFlops, frame_counts

Loaded = Generator[Batch | EncodedBatch, None, None]

DATA_WAIT = "data wait"
TO_DEVICE = "to the device"
FORWARD = "forward, loss"
BACKWARD = "backward"
UPDATE = "optimizer, engine"
PARTS = (DATA_WAIT, TO_DEVICE, FORWARD, BACKWARD, UPDATE)

WARM_UP_STEPS = {"cuda": 5, "cpu": 1}
FEWEST_STEPS = 2  # are measured however long they take


@dataclass(frozen=True)
class StepMeasurement:
    """Optimizer steps of one rank.

    Attributes:
        parts: PARTS -> ms; on a GPU as its own clock has them.
        step: ms of a whole step, the sum of its parts.
        frames: of a step, over its micro-batches.
        frames_per_s: at the median time of a step.
        frames_per_s_needed: from the loader, so that a step does not wait for it.
        host_ms: median time until the host has issued a step, without waiting for data.
        peak_bytes: GPU memory, or resident memory on a CPU.
        flops: of a micro-batch with the median number of labelled frames.
        micro_batches: of a step.
    """

    parts: dict[str, Spread]
    step: Spread
    frames: int
    frames_per_s: float
    frames_per_s_needed: float
    host_ms: float
    peak_bytes: int
    operations: Operations
    flops: DetectorFlops
    micro_batches: int

    @property
    def flops_per_s(self) -> float:
        """The model's, forward and backward, at the median time of a step."""
        return 1000 * self.flops.total * self.micro_batches / self.step.median


def measure_steps(trainer: Trainer, *, steps: int, seconds: float) -> StepMeasurement:
    """Trains some steps and measures them.

    Args:
        steps: number of measured steps.
        seconds: ends earlier after this time.
    """
    loop = StepLoop(trainer)
    try:
        return loop.measure(steps, seconds)
    finally:
        loop.close()


class StepLoop:
    """The trainer's loop without logging, checkpoints and evaluation."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.device = trainer.world.device
        self.micro_batches = trainer.config.training.gradient_accumulation_steps
        self.clock = PartClock(self.device)  # of the current step
        loaded = trainer.loader.batches(0, encoded=encodes_for(self.device))
        self.batches = device_batches(self._watched(loaded), self.device)
        self.waited_s = 0.0  # for the loader, in the current step
        self.counts: list[FrameCounts] = []  # of all micro-batches
        engine: Any = trainer.engine
        self.original = (engine.backward, engine.step)
        engine.backward = self._between(BACKWARD, engine.backward)
        engine.step = self._between(UPDATE, engine.step)

    def close(self) -> None:
        """Ends the loader and restores the engine."""
        self.batches.close()
        engine: Any = self.trainer.engine
        engine.backward, engine.step = self.original

    def _watched(self, batches: Loaded) -> Loaded:
        """The batches; what follows the wait for one is its way to the device."""
        try:
            while True:
                requested = time.perf_counter()
                batch = next(batches)
                self.waited_s += time.perf_counter() - requested
                self.clock.mark(TO_DEVICE)
                yield batch
        finally:
            batches.close()

    def _between(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call` as a part of its own; the optimizer and engine are what follows it."""

        def marked(*args: Any, **kwargs: Any) -> Any:
            self.clock.mark(part)
            result = call(*args, **kwargs)
            self.clock.mark(UPDATE)
            return result

        return marked

    def step(self) -> None:
        """One optimizer step, timed by a clock of its own."""
        self.clock = PartClock(self.device)
        self.waited_s = 0.0
        for _ in range(self.micro_batches):
            self.clock.mark(DATA_WAIT)
            batch = next(self.batches)
            self.counts.append(frame_counts(batch.labelled, batch.following))
            self.clock.mark(FORWARD)
            self.trainer.micro_batch(batch)
        self.trainer.step += 1
        self.clock.mark("")

    def measure(self, steps: int, seconds: float) -> StepMeasurement:
        """Warms up, measures, then counts the operations of further steps."""
        for _ in range(WARM_UP_STEPS.get(self.device.type, 1)):
            self.step()
        synchronize(self.device)
        reset_peak_bytes(self.device)
        # A GPU is not waited for between steps, as in training. So its times are read at the end.
        clocks: list[PartClock] = []
        hosts_ms: list[float] = []
        deadline = time.perf_counter() + seconds
        while len(clocks) < steps:
            if len(clocks) >= FEWEST_STEPS and time.perf_counter() > deadline:
                break
            started = time.perf_counter()
            self.step()
            hosts_ms.append(1000 * (time.perf_counter() - started - self.waited_s))
            clocks.append(self.clock)
        steps_ms = [clock.read_ms() for clock in clocks]
        peak = peak_bytes(self.device)
        operations = count_operations(self.step, self.device)
        synchronize(self.device)
        step = Spread.of([sum(ms.values()) for ms in steps_ms])
        parts = {name: _part_spread(steps_ms, name) for name in PARTS}
        frames = self._frames_per_micro_batch * self.micro_batches
        return StepMeasurement(
            parts=parts,
            step=step,
            frames=frames,
            frames_per_s=1000 * frames / step.median,
            frames_per_s_needed=1000 * frames / max(step.median - parts[DATA_WAIT].median, 1e-3),
            host_ms=Spread.of(hosts_ms).median,
            peak_bytes=peak,
            operations=operations,
            flops=self._flops(),
            micro_batches=self.micro_batches,
        )

    @property
    def _frames_per_micro_batch(self) -> int:
        return len(self.trainer.lanes) * self.trainer.config.training.sequence_length

    def _flops(self) -> DetectorFlops:
        """Of the micro-batch with the median number of labelled frames."""
        by_labelled = sorted(self.counts, key=lambda counts: counts.labelled)
        detector = self.trainer.engine.module
        assert isinstance(detector, Detector)
        data = self.trainer.dataset
        flops = ModelFlops(detector, data.height, data.width)
        return flops.of(by_labelled[len(by_labelled) // 2])


def _part_spread(steps_ms: Sequence[Mapping[str, float]], name: str) -> Spread:
    """Of one part of several steps; a step without the part counts 0."""
    return Spread.of([ms.get(name, 0.0) for ms in steps_ms])
