"""Frames of recordings, growing files and arrays of events, as they come: `frames_of`."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from evspan.conf.errors import RecordingError, UserError
from evspan.conf.schema.prep import FrameConfig, TimeUnit
from evspan.data_prep.frames import histogram
from evspan.data_prep.recordings.arrays import ArrayRecording, EventBlock, is_block
from evspan.data_prep.recordings.base import Recording, WordReader
from evspan.data_prep.recordings.open import open_recording
from numpy.typing import NDArray

logger = logging.getLogger(__name__)
EventSource: TypeAlias = str | Path | Recording | EventBlock | Iterable[EventBlock]


class Frame(NamedTuple):
    """A window and its histogram.

    end_us: end of the window, in microseconds of the recording's clock.
    frame: (2 * bins, H, W) uint8; channel = polarity * bins + bin, darker first, oldest bin first.
    """

    end_us: int
    frame: NDArray[np.uint8]


def frames_of(
    events: EventSource,
    config: FrameConfig | None = None,
    *,
    sensor_size: Sequence[int] | None = None,
    time_unit: TimeUnit | str | None = None,
    follow_s: float | None = None,
    stop: Callable[[], bool] | None = None,
) -> Iterator[Frame]:
    """Histogram frames of consecutive windows, from the first event on.

    A frame is yielded as soon as an event after its window is read. Memory does not grow with the
    number of events.

    >>> from evspan.data_prep import frames_of
    >>> for end_us, frame in frames_of("drive.raw"):
    ...     print(end_us, frame.shape, frame.sum())

    Args:
        events: the path of a recording of any format; or an iterable of blocks of events in the
            order of time, each (t, x, y, p) or a structured array with these fields: t in
            microseconds, integers; p 0 or -1 darker, 1 brighter. One block alone is taken, too.
        config: how events become frames: `detector.frames`, or FrameConfig(window_ms=50, bins=10,
            downsample=2), the default.
        sensor_size: (height, width) in pixels. Required for arrays; of files, for those that do
            not state it.
        time_unit: "s", "ms", "us" or "ns" of the times in a text file or NumPy archive where it is
            not certain.
        follow_s: the file (.raw, .dat) still grows: wait at its end until nothing comes for so
            many seconds.
        stop: is called while a growing file is waited for and between its blocks; true ends it.

    Yields:
        (end_us, frame).

    Raises:
        evspan.conf.errors.UserError: the events cannot be read, or there are none.
    """
    unit = TimeUnit(time_unit) if isinstance(time_unit, str) else time_unit
    recording = as_recording(events, sensor_size=sensor_size, time_unit=unit)
    if follow_s is not None:
        follow(recording, follow_s, stop)
    return windows(recording, config or FrameConfig())


def as_recording(
    events: EventSource,
    *,
    sensor_size: Sequence[int] | None = None,
    time_unit: TimeUnit | None = None,
) -> Recording:
    """Opens a path, or wraps arrays; see `frames_of`.

    Raises:
        UserError: the file cannot be read, or the size of the sensor is not given.
    """
    if isinstance(events, Recording):
        return events
    if isinstance(events, str | Path):
        return open_recording(events, unstated_size=sensor_size, time_unit=time_unit)
    if sensor_size is None:
        raise UserError("arrays do not state the sensor's size; pass sensor_size=(height, width)")
    height, width = sensor_size
    blocks = [events] if is_block(events) else events
    return ArrayRecording(blocks, height, width)  # type: ignore[arg-type]  # is_block


def follow(recording: Recording, follow_s: float, stop: Callable[[], bool] | None = None) -> None:
    """Makes a recording wait at the end of its file, which still grows.

    Raises:
        UserError: files of its format cannot be read while they are written.
    """
    if not isinstance(recording, WordReader):
        raise UserError(
            f"{recording.path} is {recording.format}, which cannot be read while it is written; "
            "record .raw or .dat, or read it when it is complete, without --follow"
        )
    recording.follow(follow_s, stop)


def windows(
    recording: Recording, config: FrameConfig, *, skip: int = 0, limit: int | None = None
) -> Iterator[Frame]:
    """The frames of consecutive windows from the recording's first event on.

    Args:
        recording: any format.
        config: how events become frames.
        skip: number of windows to leave out at the start.
        limit: number of windows to yield at most.

    Yields:
        (end of the window in us, frame (2 * bins, H, W) uint8).

    Raises:
        RecordingError: the recording has no events, or ends before the first window asked for.
    """

    def ends(first_us: int) -> Iterator[int]:
        return count(first_us + (skip + 1) * config.window_us, config.window_us)

    end_us = None
    for end_us, frame in islice(histogram.frames_of(recording, ends, config), limit):
        # Only at the end of the file can a window begin after the last event that was read.
        if recording.last_us < end_us - config.window_us:
            length_s = (recording.last_us - recording.first_us) / 1e6
            start_s = skip * config.window_us / 1e6
            raise RecordingError(
                f"{recording.path} ends {length_s:.2f} s after its first event, "
                f"before {start_s:.2f} s; begin earlier"
            )
        yield Frame(end_us, frame)
    for text in recording.warnings().values():
        logger.warning("%s: %s", recording.path, text)
    if end_us is None:
        raise RecordingError(
            f"{recording.path} holds no events. Give another recording, or record it again"
        )
