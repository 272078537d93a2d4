"""Where `evspan infer` gets frames from: the events of a recording, or prepared shards."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import DatasetConfig, FrameConfig
from evspan.data_prep.frames.histogram import frame_size
from evspan.data_prep.frames.stream import Frame, follow, windows
from evspan.data_prep.labels.box_files import RAW_BOX, read_boxes
from evspan.data_prep.recordings.open import open_recording
from evspan.pipeline.data.datasets import RecordingData, open_dataset
from evspan.pipeline.inference.options import InferOptions, RecordingFiles
from numpy.typing import NDArray

FRAMES_AT_ONCE = 8  # that are read of shards


class FrameSource(Protocol):
    """One recording.

    Attributes:
        height, width: of the sensor, in pixels.
        events: that were read so far.
        dropped: events left out or mended, by reason.
        labels: the file with its boxes; None: there are none.
    """

    height: int
    width: int
    labels: Path | None

    @property
    def events(self) -> int:
        """See above."""
        ...

    @property
    def dropped(self) -> dict[str, int]:
        """See above."""
        ...

    def frames(self, skip: int, limit: int | None) -> Iterator[Frame]:
        """The frames from `skip` on, at most `limit`."""
        ...

    def boxes(self) -> NDArray[np.void]:
        """(N,) RAW_BOX, in pixels of the sensor, sorted by time."""
        ...


def open_source(files: RecordingFiles, config: FrameConfig, options: InferOptions) -> FrameSource:
    """Opens a recording, and checks that it fits the checkpoint.

    Raises:
        UserError: it cannot be read, is too small, or was prepared with other frames.
    """
    if files.key:
        return StoredFrames(files, config, options)
    return EventFrames(files, config, options)


class EventFrames:
    """A sensor file."""

    def __init__(self, files: RecordingFiles, config: FrameConfig, options: InferOptions) -> None:
        path = files.recording
        self.recording = open_recording(
            path, unstated_size=options.sensor_size, time_unit=options.time_unit
        )
        if options.follow_s is not None:
            follow(self.recording, options.follow_s)
        self.config = config
        self.height = self.recording.height
        self.width = self.recording.width
        self.labels = files.boxes
        if min(frame_size(config, self.height, self.width)) < 1:
            raise UserError(
                f"{path} is of a sensor of {self.width} x {self.height} pixels: too small for "
                f"{options.checkpoint}, which takes frames of 1/{config.downsample} of that. Give "
                "another recording"
            )

    @property
    def events(self) -> int:
        """See `FrameSource`."""
        return self.recording.events

    @property
    def dropped(self) -> dict[str, int]:
        """See `FrameSource`."""
        return dict(self.recording.dropped)

    def frames(self, skip: int, limit: int | None) -> Iterator[Frame]:
        """See `FrameSource`."""
        return windows(self.recording, self.config, skip=skip, limit=limit)

    def boxes(self) -> NDArray[np.void]:
        """See `FrameSource`."""
        boxes: NDArray[np.void] = read_boxes(self.labels) if self.labels else np.zeros(0, RAW_BOX)
        return boxes


class StoredFrames:
    """A recording of prepared shards: its frames end where those of its labels do."""

    def __init__(self, files: RecordingFiles, config: FrameConfig, options: InferOptions) -> None:
        root = files.recording
        if options.follow_s is not None:
            raise UserError(f"{root} is a folder of shards, which does not grow; omit --follow")
        split, _, self.name = files.key.partition("/")
        data = open_dataset(DatasetConfig(root=str(root)), split)
        if data.frames != config:
            raise UserError(
                f"{root} was prepared with {data.frames}, and {options.checkpoint} takes {config}. "
                "Give the recordings, or prepare them with its frames"
            )
        self.root = root
        self.data: RecordingData = next(r for r in data.recordings if r.name == self.name)
        self.downsample = config.downsample
        self.height = data.height * config.downsample
        self.width = data.width * config.downsample
        self.labels = root if self.data.box_start[-1] else None
        self.events = 0
        self.dropped: dict[str, int] = {}

    def frames(self, skip: int, limit: int | None) -> Iterator[Frame]:
        """See `FrameSource`."""
        if skip >= self.data.frames:
            raise UserError(
                f"{self.name} in {self.root} has {self.data.frames} frames; begin earlier"
            )
        return islice(self._from(skip), limit)

    def _from(self, skip: int) -> Iterator[Frame]:
        for first in range(skip, self.data.frames, FRAMES_AT_ONCE):
            last = min(first + FRAMES_AT_ONCE, self.data.frames)
            ends = self.data.end_us[first:last] + self.data.clock_us
            for end_us, frame in zip(ends, self.data.read(first, last), strict=True):
                self.events += int(frame.sum(dtype=np.int64))
                yield Frame(int(end_us), frame)

    def boxes(self) -> NDArray[np.void]:
        """See `FrameSource`."""
        parts = [np.zeros(0, RAW_BOX)]
        for frame in np.flatnonzero(np.diff(self.data.box_start)).tolist():
            rows = self.data.boxes(frame)
            boxes = np.zeros(len(rows), RAW_BOX)
            boxes["t"] = self.data.end_us[frame] + self.data.clock_us
            for side in "xywh":
                boxes[side] = rows[side] * self.downsample
            boxes["class_id"] = rows["class_id"]
            boxes["class_confidence"] = 1
            parts.append(boxes)
        return np.concatenate(parts)
