"""Where `evspan infer` gets frames from: the events of a recording, or prepared shards."""

from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Protocol

import numpy as np
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import FrameConfig
from evspan.data_prep.frames.histogram import frame_size
from evspan.data_prep.frames.stream import Frame, follow, windows
from evspan.data_prep.labels.box_files import RAW_BOX, read_boxes
from evspan.data_prep.recordings.open import open_recording
from evspan.data_prep.recordings.sources import source_readable
from evspan.pipeline.data.datasets import RecordingData, frame_differences, open_shard_recording
from evspan.pipeline.inference.options import InferOptions, RecordingFiles
from numpy.typing import NDArray

FRAMES_AT_ONCE = 8  # that are read of shards


class FrameSource(Protocol):
    """One recording.

    Attributes:
        height, width: of the sensor, in pixels.
        first_us: time of the first event, in the sensor's clock; once a frame was read.
        events: that were read so far.
        dropped: events left out or mended, by reason.
        labels: the file with its boxes; None: there are none.
    """

    height: int
    width: int
    labels: Path | None

    @property
    def first_us(self) -> int:
        """See above."""
        ...

    @property
    def events(self) -> int:
        """See above."""
        ...

    @property
    def dropped(self) -> dict[str, int]:
        """See above."""
        ...

    def frames(self, start_s: float, seconds: float | None) -> Iterator[Frame]:
        """The frames of a part of the recording, in whole windows.

        Args:
            start_s: seconds after the first event.
            seconds: length of the part; None: to the end.
        """
        ...

    def boxes(self) -> NDArray[np.void]:
        """(N,) RAW_BOX, in pixels of the sensor, sorted by time."""
        ...

    def stop(self) -> None:
        """Ends a wait of `frames` for more data. From any thread."""
        ...


def open_source(files: RecordingFiles, config: FrameConfig, options: InferOptions) -> FrameSource:
    """Opens a recording, and checks that it fits the checkpoint.

    Raises:
        UserError: it cannot be read, is too small, or was prepared with other frames.
    """
    with source_readable():
        if files.key:
            return StoredFrames(files, config, options)
        return EventFrames(files, config, options)


def num_windows(seconds: float, config: FrameConfig) -> int:
    """The nearest number of whole windows."""
    return round(1000 * seconds / config.window_ms)


class EventFrames:
    """A sensor file."""

    def __init__(self, files: RecordingFiles, config: FrameConfig, options: InferOptions) -> None:
        path = files.recording
        self.recording = open_recording(
            path, unstated_size=options.sensor_size, time_unit=options.time_unit
        )
        self.stopped = Event()
        if options.follow_s is not None:
            follow(self.recording, options.follow_s, self.stopped.is_set)
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
    def first_us(self) -> int:
        """See `FrameSource`."""
        return self.recording.first_us

    @property
    def events(self) -> int:
        """See `FrameSource`."""
        return self.recording.events

    @property
    def dropped(self) -> dict[str, int]:
        """See `FrameSource`."""
        return dict(self.recording.dropped)

    def frames(self, start_s: float, seconds: float | None) -> Iterator[Frame]:
        """See `FrameSource`."""
        skip = num_windows(start_s, self.config)
        limit = None if seconds is None else num_windows(seconds, self.config)
        return windows(self.recording, self.config, skip=skip, limit=limit)

    def boxes(self) -> NDArray[np.void]:
        """See `FrameSource`."""
        boxes: NDArray[np.void] = read_boxes(self.labels) if self.labels else np.zeros(0, RAW_BOX)
        return boxes

    def stop(self) -> None:
        """See `FrameSource`."""
        self.stopped.set()


class StoredFrames:
    """A recording of prepared shards: its frames end where those of its labels do."""

    def __init__(self, files: RecordingFiles, config: FrameConfig, options: InferOptions) -> None:
        root = files.recording
        if options.follow_s is not None:
            raise UserError(f"{root} is a folder of shards, which does not grow; omit --follow")
        split, _, self.name = files.key.partition("/")
        data = open_shard_recording(root, split, self.name)
        if frame_differences(data.frames, config):
            raise UserError(
                f"{root} was prepared with {data.frames}, and {options.checkpoint} takes {config}. "
                "Give the recordings, or prepare them with its frames"
            )
        self.root = root
        self.data: RecordingData = data.recordings[0]
        self.first_us = self.data.clock_us
        self.window_us = config.window_us
        self.downsample = config.downsample
        self.height = data.height * config.downsample
        self.width = data.width * config.downsample
        self.labels = root if self.data.box_start[-1] else None
        self.events = 0
        self.dropped: dict[str, int] = {}

    def frames(self, start_s: float, seconds: float | None) -> Iterator[Frame]:
        """See `FrameSource`. Windows differ in length, so their times count, not their number."""
        first = self._first_frame(1e6 * start_s)
        if first >= self.data.frames:
            raise UserError(
                f"{self.name} in {self.root} has {self.data.frames} frames; begin earlier"
            )
        last = self.data.frames
        if seconds is not None:
            begin_us = self.data.end_us[first] - self.window_us
            last = self._num_ended(begin_us + 1e6 * seconds + self.window_us / 2)
        return self._between(first, last)

    def _first_frame(self, start_us: float) -> int:
        """Index of the first frame that begins at most half a window before this time."""
        if start_us <= self.window_us / 2:  # the first window may begin before the first event
            return 0
        return int(np.searchsorted(self.data.end_us, start_us + self.window_us / 2))

    def _num_ended(self, time_us: float) -> int:
        return int(np.searchsorted(self.data.end_us, time_us, side="right"))

    def _between(self, start: int, stop: int) -> Iterator[Frame]:
        for first in range(start, stop, FRAMES_AT_ONCE):
            last = min(first + FRAMES_AT_ONCE, stop)
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

    def stop(self) -> None:
        """See `FrameSource`. Shards do not grow, so nothing is waited for."""
