"""Reads scalar curves from a run's TensorBoard event files."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

EVENT_FOLDER = "tensorboard"  # in the run folder
IMAGE_BYTES = 1 << 12  # larger records are images, not scalars
SESSION_BYTES = 64  # records up to this size may mark the start of an attempt


class Point(NamedTuple):
    """A scalar. time: in seconds since 1970."""

    step: int
    value: float
    time: float


@dataclass
class Curve:
    """The scalars of one tag.

    Attributes:
        points: the valid ones: a step that a later attempt computed again counts once.
        all_points: also those that a later attempt replaced.
    """

    points: list[Point] = field(default_factory=list)
    all_points: list[Point] = field(default_factory=list)


def read_curves(run: Path, tags: Sequence[str]) -> dict[str, Curve]:
    """The curves of these tags. Damaged records and the half-written end of a file are skipped."""
    curves = {tag: Curve() for tag in tags}
    encoded_tags = [tag.encode() for tag in tags]
    for path in sorted((run / EVENT_FOLDER).glob("*tfevents*")):
        for record in _records(path):
            has_tag = any(tag in record for tag in encoded_tags)
            if has_tag or len(record) <= SESSION_BYTES:
                _add_event(Event.FromString(record), curves)
    return curves


def _add_event(event: Event, curves: dict[str, Curve]) -> None:
    if event.session_log.status == SessionLog.START:  # a new attempt continues from event.step
        for curve in curves.values():
            curve.points = [point for point in curve.points if point.step < event.step]
    for value in event.summary.value:
        if value.tag in curves and value.WhichOneof("value") == "simple_value":
            point = Point(event.step, value.simple_value, event.wall_time)
            curves[value.tag].points.append(point)
            curves[value.tag].all_points.append(point)


def _records(path: Path) -> Iterator[bytes]:
    """The undamaged records of a TFRecord file, without images.

    TensorBoard's own reader computes the checksums of all images, in Python.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        while file.tell() + 12 <= size:
            header = file.read(12)  # the length and its checksum
            (length,) = struct.unpack("<Q", header[:8])
            if file.tell() + length + 4 > size:
                return
            if length > IMAGE_BYTES:
                file.seek(length + 4, 1)
                continue
            record = file.read(length)
            (checksum,) = struct.unpack("<I", file.read(4))
            if masked_crc32c(record) == checksum:
                yield record
