"""TensorBoard's files of a run: the curves that the report draws, and the run as a row of TensorBoard's HParams."""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c
from tensorboard.plugins.hparams import summary_v2 as hparams
from tensorboard.summary.writer.event_file_writer import EventFileWriter

CURVES, HPARAMS = "tensorboard", "hparams"  # folders of a run
LARGE = 1 << 12  # bytes of a record that is no scalar, but a picture
SHORT = 64  # of one that tells of a new attempt


class Point(NamedTuple):
    step: int
    value: float
    time: float


@dataclass
class Curve:
    """points: what holds. every: also those that a later attempt took back, because it began before them."""

    points: list[Point] = field(default_factory=list)
    every: list[Point] = field(default_factory=list)


def read_curves(run: Path, tags: Sequence[str]) -> dict[str, Curve]:
    """The scalars of these names; a file's half-written end is passed over."""
    curves = {tag: Curve() for tag in tags}
    wanted = [tag.encode() for tag in tags]
    for path in sorted((run / CURVES).glob("*tfevents*")):
        for record in _records(path):
            if len(record) > SHORT and not any(tag in record for tag in wanted):
                continue
            event = Event.FromString(record)
            if event.session_log.status == SessionLog.START:
                for curve in curves.values():
                    curve.points = [p for p in curve.points if p.step < event.step]
            for value in event.summary.value:
                if value.tag in curves and value.WhichOneof("value") == "simple_value":
                    point = Point(event.step, value.simple_value, event.wall_time)
                    curves[value.tag].points.append(point)
                    curves[value.tag].every.append(point)
    return curves


def _records(path: Path) -> Iterator[bytes]:
    """Of a TFRecord file, without large and damaged ones: TensorBoard's reader takes the checksum of all pictures, in Python."""
    with path.open("rb") as file:
        size = path.stat().st_size
        while len(header := file.read(12)) == 12:  # the length, its checksum
            length = struct.unpack("<Q", header[:8])[0]
            if file.tell() + length + 4 > size:
                return
            if length > LARGE:
                file.seek(length + 4, 1)
                continue
            record, checksum = file.read(length), struct.unpack("<I", file.read(4))[0]
            if masked_crc32c(record) == checksum:
                yield record


def write_hparams(
    run: Path,
    values: Mapping[str, bool | int | float | str],
    metrics: Mapping[str, float],
    began: float,
) -> None:
    """RUN/hparams: one session of TensorBoard's HParams, in place of the one that was there. began: seconds since 1970."""
    old = list((run / HPARAMS).glob("*tfevents*"))
    writer = EventFileWriter(str(run / HPARAMS))
    try:
        about = hparams.hparams_pb(
            dict(values), trial_id=str(run.absolute()), start_time_secs=began
        )
        for summary in (
            about,
            *(Summary(value=[Summary.Value(tag=k, simple_value=v)]) for k, v in metrics.items()),
        ):
            writer.add_event(Event(wall_time=began, step=0, summary=summary))
    finally:
        writer.close()
    for path in old:
        path.unlink(missing_ok=True)
