"""The model's FLOPs by time, and their fraction of the device's peak (MFU)."""

import logging
import math

from evspan.conf.errors import ConfigError
from evspan.conf.schema.training import TrainingConfig
from evspan.pipeline.benchmark.peaks import Peak, device_peak
from evspan.pipeline.data.batch import Batch
from evspan.pipeline.model.flops import (
    ATTENTION,
    HEAD,
    NECK,
    NO_FRAMES,
    DetectorFlops,
    FrameCounts,
    ModelFlops,
    PartFlops,
    frame_counts,
)
from evspan.pipeline.parallel.world import World

logger = logging.getLogger(__name__)
MFU = "speed/mfu"
TERAFLOPS = "speed/model_tflops_per_s"
FEWEST_STEPS = 10  # an attempt with fewer ends before a measurement of the peak is of use
SUMMARY_PARTS = (NECK, ATTENTION, HEAD)  # all others are the backbone's


class Utilization:
    """Adds up the FLOPs that a rank computes.

    Model FLOPs are those of forward and backward without recomputation, and of no other work.

    Args:
        flops: of the detector.
        peak: of this rank's device; None: it is not known, so there is no MFU.
        begins: whether the rank holds the chunks' first frames.
    """

    def __init__(self, flops: ModelFlops, peak: Peak | None, *, begins: bool) -> None:
        self.flops = flops
        self.peak = peak
        self.begins = begins
        self.counts: FrameCounts = NO_FRAMES  # since the last reading

    def add(self, batch: Batch) -> None:
        """Counts a micro-batch."""
        self.counts += frame_counts(batch.labelled, batch.following, begins=self.begins)

    def read(self, seconds: float) -> dict[str, float]:
        """TensorBoard tag -> value of this rank since the last call. NaN: not known.

        Args:
            seconds: since the last call.
        """
        per_second = self.flops.of(self.counts).total / seconds
        self.counts = NO_FRAMES
        mfu = math.nan if self.peak is None else per_second / self.peak.flops
        return {TERAFLOPS: per_second / 1e12, MFU: mfu}


def training_peak(config: TrainingConfig, world: World, *, steps: int) -> Peak | None:
    """The peak of this rank's device; on a CPU it is measured, by all ranks at the same time.

    Args:
        config: its precision is not `auto`.
        steps: that this attempt will train at most.

    Returns:
        None where it is not known, which rank 0 logs, or where too few steps would use it.
    """
    if steps < FEWEST_STEPS:
        return None
    try:
        return device_peak(world.device, config.precision, config.peak_tflops)
    except ConfigError as error:
        if world.is_main:
            logger.info("MFU is not reported: %s", error)
        return None


def flops_line(flops: DetectorFlops, peak: Peak | None) -> str:
    """What a frame costs, by part.

    Args:
        flops: of frames that are all labelled.
        peak: of a rank's device.
    """
    fractions = {name: 0.0 for name in ("backbone", *SUMMARY_PARTS)}
    for part in flops.parts:
        name = part.name if part.name in SUMMARY_PARTS else "backbone"
        fractions[name] += part.total / flops.total
    parts = ", ".join(f"{name} {100 * f:.0f} %" for name, f in fractions.items() if f)
    text = f"{_scaled(flops.total / flops.frames, 'FLOP')} a labelled frame: {parts}"
    if peak is not None:
        text += f"; a rank's peak is {_scaled(peak.flops, 'FLOP/s')} ({peak.source})"
    return text


def flops_table(flops: DetectorFlops) -> str:
    """Markdown: GFLOP of a frame by part, forward and with backward.

    Args:
        flops: of frames that are all labelled.
    """
    rows = ["| part | GFLOP forward | with backward | |", "|---|---|---|---|"]
    whole = PartFlops("all", flops.forward, flops.total - flops.forward)
    for part in (*flops.parts, whole):
        forward = part.forward / flops.frames / 1e9
        total = part.total / flops.frames / 1e9
        fraction = 100 * part.total / flops.total
        rows.append(f"| {part.name} | {forward:.3g} | {total:.3g} | {fraction:.0f} % |")
    return "\n".join(rows)


def _scaled(value: float, unit: str) -> str:
    """'12.3 GFLOP', '1.2 TFLOP/s'."""
    if value >= 1e12:
        return f"{value / 1e12:.3g} T{unit}"
    return f"{value / 1e9:.3g} G{unit}"
