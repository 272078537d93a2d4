"""`evspan prep info`: format, sensor, time span, counts and rate of a recording."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def information(path: Path) -> dict[str, Any]:
    """What a recording contains, as JSON values.

    Raises:
        UserError: the recording cannot be read.
    """
    recording = open_recording(path)
    statistics = event_statistics(recording)
    boxes = find_boxes(path)
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "format": recording.format,
        "width": recording.width,
        "height": recording.height,
        "size_is_assumed": recording.size_is_assumed,
        "events": recording.events,
        "dropped": {reason: n for reason, n in recording.dropped.items() if n},
        "first_us": recording.first_us if recording.events else None,
        "last_us": recording.last_us if recording.events else None,
        "brighter": statistics.brighter,
        "busiest_10ms": statistics.busiest,
        "boxes_file": boxes.name if boxes else None,
        "boxes": int(read_boxes(boxes).size) if boxes else 0,
        "warnings": list(recording.warnings().values()),
    }


def _lines(info: dict[str, Any]) -> Iterator[str]:
    yield f"file      {info['file']} ({info['bytes'] / 1e6:.1f} MB)"
    yield f"format    {info['format']}"
    assumed = " (assumed: the file does not state it)" if info["size_is_assumed"] else ""
    yield f"sensor    {info['width']} x {info['height']}{assumed}"
    yield f"events    {info['events']}{dropped_summary(info['dropped'])}"
    if info["events"]:
        span_s = (info["last_us"] - info["first_us"]) / 1e6
        rate = info["events"] / max(span_s, 1e-6) / 1e6
        busiest = info["busiest_10ms"] / SLICE_US
        yield f"time      {info['first_us']} to {info['last_us']} us, {span_s:.3f} s"
        yield (f"rate      {rate:.2f} M events/s on average, {busiest:.2f} in the busiest 10 ms")
        yield f"brighter  {info['brighter'] / info['events']:.1%}"
    if info["boxes_file"]:
        yield f"boxes     {info['boxes']} in {info['boxes_file']}"
    else:
        yield "boxes     none next to it"
    for text in info["warnings"]:
        yield f"warning   {text}"


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    recording: Path
    json: bool


def _parse(argv: Sequence[str]) -> Options:
    parser = Parser(
        "evspan prep info",
        description="Prints what a recording contains.",
        epilog="example: evspan prep info drive.raw",
    )
    parser.add_argument("recording", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    return Options(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    options = _parse(argv)
    info = information(options.recording)
    if options.json:
        print(json.dumps(info, indent=1))
    else:
        print("\n".join(_lines(info)))
