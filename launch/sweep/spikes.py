"""The loss spikes in a run's history: `spike` events of `evspan.pipeline.engine.loss_spikes`."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from evspan.conf.text import plural, printable
from evspan.launch.sweep.state import number
from evspan.pipeline.history import SPIKE

LANES_SHOWN = 4
SHOWN = 5  # most spikes of a run that `evspan status` lists


class LaneRead(NamedTuple):
    """What a lane read in the step. frame: the first of `frames` frames of the recording."""

    lane: int
    recording: str
    file: str
    frame: int
    frames: int


class Spike(NamedTuple):
    """A step whose loss was far above those before it.

    loss: None if it was not finite. sigmas: standard deviations above the mean of the steps before;
    None with the loss.
    """

    step: int
    micro_batch: int
    loss: float | None
    mean: float | None
    sigmas: float | None
    batch: list[LaneRead]

    def describe(self) -> str:
        """One line with the recordings of the first lanes."""
        text = f"loss spike in step {self.step}: "
        if self.loss is None or self.sigmas is None or self.mean is None:
            text += "not finite"
        else:
            text += f"{self.loss:.4g}, {self.sigmas:.1f} sigma above the mean {self.mean:.4g}"
        lanes = self.lanes()
        return f"{text}; {lanes}" if lanes else text

    def lanes(self) -> str:
        """'lane 0: a (train/00000.h5) from frame 120; ...'."""
        parts = [
            f"lane {lane.lane}: {lane.recording} ({lane.file}) from frame {lane.frame}"
            for lane in self.batch[:LANES_SHOWN]
        ]
        more = len(self.batch) - LANES_SHOWN
        if more > 0:
            parts.append(plural(more, "more lane"))
        return "; ".join(parts)


def read_spikes(events: Iterable[Mapping[str, Any]]) -> list[Spike]:
    """The spikes of a run in the order of their steps.

    A step that was repeated after a requeue counts once: as it was computed last.
    """
    spikes: dict[tuple[int, int], Spike] = {}
    for event in events:
        step = event.get("step")
        if event.get("event") == SPIKE and isinstance(step, int):
            spike = Spike(
                step=step,
                micro_batch=_integer(event.get("micro_batch")),
                loss=number(event.get("loss")),
                mean=number(event.get("mean")),
                sigmas=number(event.get("sigmas")),
                batch=_lanes(event.get("batch")),
            )
            spikes[step, spike.micro_batch] = spike
    return [spikes[key] for key in sorted(spikes)]


def _lanes(batch: object) -> list[LaneRead]:
    if not isinstance(batch, list):
        return []
    return [
        LaneRead(
            lane=_integer(lane.get("lane")),
            recording=printable(str(lane.get("recording", ""))),
            file=printable(str(lane.get("file", ""))),
            frame=_integer(lane.get("frame")),
            frames=_integer(lane.get("frames")),
        )
        for lane in batch
        if isinstance(lane, dict)
    ]


def _integer(value: object) -> int:
    """`value` if it is an integer, else 0."""
    return value if type(value) is int else 0


def spike_lines(spikes: Sequence[Spike]) -> list[str]:
    """A line for each of the last spikes of a run."""
    lines = [spike.describe() for spike in spikes[-SHOWN:]]
    earlier = len(spikes) - SHOWN
    if earlier > 0:
        lines.insert(0, f"{plural(earlier, 'earlier loss spike')}; --json lists all")
    return lines
