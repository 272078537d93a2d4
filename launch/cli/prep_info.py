"""`evspan prep info`: format, sensor, time span, counts and rate of a recording."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from evspan.data_prep.labels.box_files import find_boxes, read_boxes
from evspan.data_prep.recordings.base import Recording
from evspan.data_prep.recordings.open import open_recording
from evspan.launch.cli.command import Parser

SLICE_US = 10_000  # for the highest rate


@dataclass(frozen=True)
class EventStatistics:
    """Statistics of a recording's events.

    Attributes:
        brighter: events with polarity 1.
        busiest: the most events in 10 ms.
    """

    brighter: int
    busiest: int


def event_statistics(recording: Recording) -> EventStatistics:
    """Reads all events of the recording."""
    brighter = 0
    per_slice: Counter[int] = Counter()
    for events in recording.chunks():
        brighter += int(events.p.sum(dtype=np.int64))
        slices, counts = np.unique(events.t // SLICE_US, return_counts=True)
        for slice_number, events_in_slice in zip(slices.tolist(), counts.tolist(), strict=True):
            per_slice[slice_number] += events_in_slice
    return EventStatistics(brighter, max(per_slice.values(), default=0))


def dropped_summary(dropped: Mapping[str, int]) -> str:
    """' (12 outside sensor)'; empty where nothing was dropped."""
    parts = [f"{n} {reason.replace('_', ' ')}" for reason, n in dropped.items() if n]
    return f" ({', '.join(parts)})" if parts else ""


def _parse(argv: Sequence[str]) -> Path:
    """The recording."""
    parser = Parser(
        "evspan prep info",
        description="Prints what a recording contains.",
        epilog="example: evspan prep info drive.raw",
    )
    parser.add_argument("recording", type=Path)
    recording: Path = parser.parse_args(argv).recording
    return recording


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    path = _parse(argv)
    recording = open_recording(path)
    statistics = event_statistics(recording)
    print(f"file      {path} ({path.stat().st_size / 1e6:.1f} MB)")
    print(f"format    {recording.format}")
    assumed = " (assumed: the file does not state it)" if recording.size_is_assumed else ""
    print(f"sensor    {recording.width} x {recording.height}{assumed}")
    print(f"events    {recording.events}{dropped_summary(recording.dropped)}")
    if recording.events:
        span_s = (recording.last_us - recording.first_us) / 1e6
        rate = recording.events / max(span_s, 1e-6) / 1e6
        print(f"time      {recording.first_us} to {recording.last_us} us, {span_s:.3f} s")
        print(
            f"rate      {rate:.2f} M events/s on average, {statistics.busiest / SLICE_US:.2f} in "
            "the busiest 10 ms"
        )
        print(f"brighter  {statistics.brighter / recording.events:.1%}")
    boxes = find_boxes(path)
    if boxes:
        print(f"boxes     {read_boxes(boxes).size} in {boxes.name}")
    else:
        print("boxes     none next to it")
    for text in recording.warnings().values():
        print(f"warning   {text}")
