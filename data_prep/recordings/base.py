"""What all readers and writers have in common."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from evspan.conf.errors import RecordingError
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.header import read_header, sensor_size
from numba import njit
from numpy.typing import NDArray

GEN4_SIZE = (720, 1280)
FOLLOW_POLL_S = 0.005  # a tenth of a window


@njit(cache=True, nogil=True)
def _faults(t, x, y, latest, height, width):
    """How many events lie outside the sensor, and how many are earlier than the one before (the first: than `latest`)."""
    outside = 0
    for i in range(x.size):
        outside += (x[i] >= width) | (y[i] >= height)
    late = np.int64(t.size > 0 and t[0] < latest)
    for i in range(1, t.size):
        late += t[i] < t[i - 1]
    return outside, late


@njit(cache=True, nogil=True)
def _raise(t, latest):
    """Raise times to the latest seen; returns how many were."""
    late = 0
    for i in range(t.size):
        if t[i] < latest:
            t[i] = latest
            late += 1
        else:
            latest = t[i]
    return late


class Recording:
    """A sensor file. `chunks()` reads it from its beginning, as often as it is called, in bounded memory.

    height, width: the sensor's, in pixels. dropped: what the last complete `chunks()` left out or mended, by reason:
    `outside_sensor` and `before_first_time` events dropped (a stream that was cut out of another begins with events whose time
    is not known), `late_timestamps_raised` events whose time ran backwards and was raised to the latest seen.
    events, first_us, last_us: how many events `chunks()` has read so far, and the times of the first and the last.
    """

    format: str

    def __init__(self, path: Path, height: int, width: int) -> None:
        self.path, self.height, self.width = path, height, width
        self.dropped: dict[str, int] = {}
        self.events = self.first_us = self.last_us = 0

    def chunks(self, chunk_events: int = 1_000_000) -> Iterator[Events]:
        """Events in file order, times unwrapped and non-decreasing, pixels inside the sensor; at most `chunk_events` at once.

        Raises:
            RecordingError: the file ends inside a word, or cannot be read.
        """
        self.dropped = {"outside_sensor": 0, "before_first_time": 0, "late_timestamps_raised": 0}
        self.events, latest = 0, np.iinfo(np.int64).min
        for events in self._decoded():
            outside, late = _faults(
                events.t, events.x, events.y, latest, self.height, self.width
            )  # one pass, in the cache
            if outside:
                self.dropped["outside_sensor"] += outside
                events = events.take((events.x < self.width) & (events.y < self.height))
                _, late = _faults(events.t, events.x, events.y, latest, self.height, self.width)
            if not events.t.size:
                continue
            if late:
                events = events._replace(t=events.t.copy())
                self.dropped["late_timestamps_raised"] += _raise(events.t, latest)
            if not self.events:
                self.first_us = int(events.t[0])
            latest = int(events.t[-1])
            self.last_us, self.events = latest, self.events + events.t.size
            for i in range(0, events.t.size, chunk_events):
                yield events.take(slice(i, i + chunk_events))

    def _decoded(self) -> Iterator[Events]:
        raise NotImplementedError


class WordReader(Recording):
    """A text header, then words of one size, which a compiled loop decodes block by block."""

    word: np.dtype
    events_per_word: int  # at most
    default_size: tuple[int, int] | None = None  # of a sensor whose header does not tell it
    idle_s = 0.0  # how long the file's end is waited at

    def __init__(
        self, path: Path, block_bytes: int = 1 << 18
    ) -> None:  # blocks that stay in the cache: 1.4 x as fast as 1 MiB
        self.fields, self.start = read_header(path)
        self.words_at_once = max(1, block_bytes // self.word.itemsize)
        super().__init__(path, *sensor_size(path, self.fields, self.default_size))

    def follow(self, idle_s: float) -> None:
        """From now on wait at the file's end for more, as of a camera that still writes, until none comes for `idle_s`."""
        self.idle_s = idle_s

    def _decoded(self) -> Iterator[Events]:
        size = self.path.stat().st_size
        if not self.idle_s and (over := (size - self.start) % self.word.itemsize):
            raise RecordingError(
                f"{self.path} is cut off: {over} byte{'s' if over > 1 else ''} too many at byte {size - over} "
                f"of {size}, where a word of {self.word.itemsize} should follow. Copy it again, or keep its "
                f"whole words: head -c {size - over}"
            )
        state = np.zeros(8, np.int64)
        for words in self._words():
            n = self.events_per_word * words.size
            events = Events(
                np.empty(n, np.int64),
                np.empty(n, np.uint16),
                np.empty(n, np.uint16),
                np.empty(n, np.uint8),
            )
            timeless, n = self._decode(words, state, events)
            self.dropped["before_first_time"] += timeless
            yield events.take(slice(timeless, n))

    def _words(self) -> Iterator[NDArray]:
        """Whole ones, block by block; the last may be half written yet where the file still grows."""
        read, heard = 0, time.monotonic()
        with self.path.open("rb") as file:
            file.seek(self.start)
            while True:
                words = np.fromfile(file, self.word, self.words_at_once)
                if words.size:
                    yield words
                    read, heard = read + words.size, time.monotonic()
                elif time.monotonic() - heard >= self.idle_s:
                    return
                else:
                    time.sleep(FOLLOW_POLL_S)
                if self.idle_s:
                    file.seek(self.start + read * self.word.itemsize)

    def _decode(self, words: NDArray, state: NDArray[np.int64], events: Events) -> tuple[int, int]:
        """Fill `events` from `words`; how many of them came before the first time word, and how many there are in all.

        state: zeros before the first block; carries on from block to block.
        """
        raise NotImplementedError


class Writer(AbstractContextManager["Writer"]):
    """Events to a sensor file, as they come: in order of time, from 0 us on, inside the sensor."""

    largest_side = 1 << 16  # pixels that the format can tell
    earliest_us = 0

    def __init__(self, path: Path, height: int, width: int) -> None:
        if max(height, width) > self.largest_side:
            raise RecordingError(
                f"{path}: a sensor of {width} x {height} does not fit {path.suffix}, which has room for "
                f"{self.largest_side} pixels a side. Write .h5"
            )
        self.path, self.height, self.width, self.last_us = path, height, width, self.earliest_us

    def write(self, events: Events) -> None:
        """Raises RecordingError: times that run backwards or begin too early, or pixels outside the sensor."""
        if not events.t.size:
            return
        if events.t[0] < self.last_us or bool((events.t[1:] < events.t[:-1]).any()):
            raise RecordingError(
                f"{self.path}: events must come in order of time, from {self.last_us} us on; these run from "
                f"{events.t.min()} to {events.t.max()} us. Sort them first"
            )
        if events.x.max() >= self.width or events.y.max() >= self.height or events.p.max() > 1:
            raise RecordingError(
                f"{self.path}: events up to x {events.x.max()}, y {events.y.max()} and p {events.p.max()} do "
                f"not fit a sensor of {self.width} x {self.height} with p 0 and 1. Leave them out first"
            )
        self._write(events)
        self.last_us = int(events.t[-1])

    def _write(self, events: Events) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __exit__(self, *_: object) -> None:
        self.close()
