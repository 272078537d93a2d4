"""The base classes of all readers and writers of recordings."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from evspan.conf.errors import RecordingError
from evspan.conf.text import plural
from evspan.data_prep.recordings.events import Events, empty_events, no_events
from evspan.data_prep.recordings.header import read_header, require_size, stated_size
from evspan.data_prep.recordings.rates import time_unit_warning
from evspan.data_prep.recordings.time_order import TimeOrder
from numba import njit
from numpy.typing import NDArray

BLOCK_BYTES = 1 << 18  # stays in the cache: 1.4 x as fast as 1 MiB
FOLLOW_POLL_S = 0.005  # a tenth of a window
STATE_SIZE = 8
REASONS = (
    "outside_sensor",
    "before_first_time",
    "time_spikes",
    "late_timestamps_raised",
    "late_by_1_ms_or_more",
)
LONELY_US = 1_000_000  # an event so far from all others is likely damaged
FEW_MOVED = 0.001  # a fraction of events that is moved or dropped without a warning


@njit(cache=True, nogil=True)
def _count_faults(
    t: NDArray[np.int64],
    x: NDArray[np.uint16],
    y: NDArray[np.uint16],
    latest: int,
    height: int,
    width: int,
) -> tuple[int, int]:
    """Counts events outside the sensor, and events earlier than the one before, in one pass.

    Args:
        t, x, y: (N,) columns of the events.
        latest: time in us of the event before the first.
    """
    outside = 0
    for i in range(x.size):
        outside += (x[i] >= width) | (y[i] >= height)
    late = int(t.size > 0 and t[0] < latest)
    for i in range(1, t.size):
        late += t[i] < t[i - 1]
    return outside, late


class Recording:
    """A sensor file. Each call of `chunks()` reads it from its beginning, in bounded memory.

    Attributes:
        height, width: pixels of the sensor.
        size_is_assumed: the file does not state them, nor did the caller.
        dropped: events that the last complete `chunks()` dropped or corrected, by reason.
            `outside_sensor`: dropped.
            `before_first_time`: dropped; a stream that was cut out of a longer one begins with
            events whose time is unknown.
            `time_spikes`: dropped; see `time_order`.
            `late_timestamps_raised`: the time ran backwards and was raised to the latest before.
            `late_by_1_ms_or_more`: those of them that were raised by so much.
        events: events that `chunks()` has returned so far.
        first_us, last_us: times of the first and the last of them.
        is_live: the file still grows; nothing that was written is held back.
    """

    format: ClassVar[str]
    is_live = False

    def __init__(
        self, path: Path, height: int, width: int, *, size_is_assumed: bool = False
    ) -> None:
        self.path = path
        self.height = height
        self.width = width
        self.size_is_assumed = size_is_assumed
        self.dropped: dict[str, int] = {}
        self.events = 0
        self.first_us = 0
        self.last_us = 0
        self._order = TimeOrder()
        self._largest_xy = (0, 0)
        self._second_us = 0
        self._last_gap_us = 0

    def chunks(self, chunk_events: int = 1_000_000) -> Iterator[Events]:
        """Yields events in file order, with unwrapped, non-decreasing times, inside the sensor.

        Args:
            chunk_events: the most events of one chunk.

        Raises:
            RecordingError: the file ends inside a word, or cannot be read.
        """
        self.dropped = dict.fromkeys(REASONS, 0)
        self.events = 0
        self._order = TimeOrder()
        self._largest_xy = (0, 0)
        for events in self._corrected():
            if not events.t.size:
                continue
            self._note_ends(events.t)
            for i in range(0, events.t.size, chunk_events):
                yield events.take(slice(i, i + chunk_events))

    def _corrected(self) -> Iterator[Events]:
        """Drops events outside the sensor and spikes, and raises late times; counts them."""
        order = self._order
        for events in self._decoded():
            if self.size_is_assumed:
                self._note_largest(events)
            t, x, y, _ = events
            outside, late = _count_faults(t, x, y, order.latest, self.height, self.width)
            if not outside and not late and order.passes(t, is_last=self.is_live):
                yield events  # as a rule
            else:
                yield self._settled(self._inside(events, outside), is_last=self.is_live)
        yield self._settled(no_events(), is_last=True)

    def _inside(self, events: Events, outside: int) -> Events:
        if not outside:
            return events
        self.dropped["outside_sensor"] += outside
        return events.take((events.x < self.width) & (events.y < self.height))

    def _settled(self, events: Events, *, is_last: bool) -> Events:
        settled = self._order.settle(events, is_last=is_last)
        self.dropped["time_spikes"] = self._order.spikes
        self.dropped["late_timestamps_raised"] = self._order.late
        self.dropped["late_by_1_ms_or_more"] = self._order.far_late
        return settled

    def _note_ends(self, t: NDArray[np.int64]) -> None:
        """Args: t: (N,) times of the next events, N > 0."""
        if not self.events:
            self.first_us = int(t[0])
            self.last_us = self.first_us
        if self.events < 2 <= self.events + t.size:
            self._second_us = int(t[1 - self.events])
        before = t[-2] if t.size > 1 else self.last_us
        self.last_us = int(t[-1])
        self._last_gap_us = self.last_us - int(before)
        self.events += t.size

    def _note_largest(self, events: Events) -> None:
        if events.t.size:
            x, y = self._largest_xy
            self._largest_xy = (max(x, int(events.x.max())), max(y, int(events.y.max())))

    def warnings(self) -> dict[str, str]:
        """What is doubtful about the recording, by kind. Complete after `chunks()`.

        Kinds: `sensor_size`, `time_order`, `time_unit`, `unknown_times`, `lonely_events`.
        """
        texts = {
            "sensor_size": self._sensor_size_warning(),
            "time_order": self._time_order_warning(),
            "time_unit": time_unit_warning(
                self.events, self.last_us - self.first_us, self.height * self.width
            ),
            "unknown_times": self._unknown_times_warning(),
            "lonely_events": self._lonely_events_warning(),
        }
        return {kind: text for kind, text in texts.items() if text}

    def _sensor_size_warning(self) -> str:
        if not self.size_is_assumed:
            return ""
        x, y = self._largest_xy
        return (
            f"the file does not state the sensor's size; {self.width} x {self.height} is assumed. "
            f"Its events reach x {x} and y {y}. Where this is wrong, set "
            "dataset.sensor_size=[HEIGHT,WIDTH] (evspan infer: --sensor-size WxH)"
        )

    def _time_order_warning(self) -> str:
        step = self._order.largest_step_back
        spikes = self._order.spikes
        parts: list[str] = []
        if spikes:
            parts.append(
                f"dropped as spikes: {plural(spikes, 'event')} far ahead of those before and after"
            )
        if step is not None:
            parts.append(
                f"the time ran backwards, and {plural(self._order.late, 'event')} were moved to "
                f"the latest time before; the largest step is at event {step.event}, at "
                f"{step.time_us} us, {step.by_us} us back"
            )
        has_many = self._order.late > FEW_MOVED * max(1, self.events)
        return "; ".join(parts) if has_many or spikes else ""

    def _lonely_events_warning(self) -> str:
        """Of the first and the last event it cannot be decided whether they are spikes."""
        parts: list[str] = []
        if self.events > 2 and self._second_us - self.first_us > LONELY_US:
            gap_us = self._second_us - self.first_us
            parts.append(f"the first, at {self.first_us} us, {gap_us} us before the second")
        if self.events > 2 and self._last_gap_us > LONELY_US:
            gap_us = self._last_gap_us
            parts.append(f"the last, at {self.last_us} us, {gap_us} us after the one before")
        if not parts:
            return ""
        return (
            f"{plural(len(parts), 'event')} far from all others ({'; '.join(parts)}), kept: the "
            "time is likely damaged, and frames without events fill the gap. Cut the event off"
        )

    def _unknown_times_warning(self) -> str:
        """Cameras repeat the time often, so that only few events may come before the first."""
        timeless = self.dropped.get("before_first_time", 0)
        if timeless <= FEW_MOVED * (self.events + timeless):
            return ""
        return (
            f"{timeless} of {self.events + timeless} events come before the first time word "
            "(TIME_HIGH), so that their time is unknown; they were dropped. The stream is damaged, "
            "or was cut out of a longer one"
        )

    def _decoded(self) -> Iterator[Events]:
        """Yields the events as they are in the file."""
        raise NotImplementedError


class WordReader(Recording):
    """A text header, then words of one size, which a compiled loop decodes block by block."""

    word: ClassVar[np.dtype[Any]]
    events_per_word: ClassVar[int]  # at most
    # Size of a sensor whose header does not contain it.
    default_size: ClassVar[tuple[int, int] | None] = None
    idle_s = 0.0  # how long the reader waits at the end of the file
    stop: Callable[[], bool] | None = None  # ends the wait

    def __init__(
        self,
        path: Path,
        block_bytes: int = BLOCK_BYTES,
        *,
        unstated_size: tuple[int, int] | None = None,
    ) -> None:
        self.fields, self.start = read_header(path)
        self.words_at_once = max(1, block_bytes // self.word.itemsize)
        size = stated_size(path, self.fields) or unstated_size
        is_assumed = size is None
        if size is None:
            size = require_size(path, self.default_size)
        super().__init__(path, *size, size_is_assumed=is_assumed)

    def follow(self, idle_s: float, stop: Callable[[], bool] | None = None) -> None:
        """Makes `chunks()` wait at the end of a file that still grows.

        Args:
            idle_s: seconds without new words after which the recording is complete.
            stop: is called before each block; true: the recording is complete.
        """
        self.idle_s = idle_s
        self.stop = stop
        self.is_live = idle_s > 0

    def _decoded(self) -> Iterator[Events]:
        if not self.idle_s:
            self._require_whole_words()
        state = np.zeros(STATE_SIZE, np.int64)
        for words in self._words():
            events = empty_events(self.events_per_word * words.size)
            timeless, total = self._decode(words, state, events)
            self.dropped["before_first_time"] += timeless
            yield events.take(slice(timeless, total))

    def _require_whole_words(self) -> None:
        size = self.path.stat().st_size
        excess = (size - self.start) % self.word.itemsize
        if excess:
            raise RecordingError(
                f"{self.path} is cut off: {plural(excess, 'byte')} too many at byte "
                f"{size - excess} of {size}, where a word of {self.word.itemsize} should follow. "
                f"Copy it again, or keep its whole words: head -c {size - excess}"
            )

    def _words(self) -> Iterator[NDArray[Any]]:
        """Yields whole words, block by block.

        In a file that grows, a word that is written only in part is read again later.
        """
        words_read = 0
        last_progress = time.monotonic()
        with self.path.open("rb") as file:
            file.seek(self.start)
            while not (self.stop and self.stop()):
                words = np.fromfile(file, self.word, self.words_at_once)
                if words.size:
                    yield words
                    words_read += words.size
                    last_progress = time.monotonic()
                elif time.monotonic() - last_progress >= self.idle_s:
                    return
                else:
                    time.sleep(FOLLOW_POLL_S)
                if self.idle_s:
                    file.seek(self.start + words_read * self.word.itemsize)

    def _decode(
        self, words: NDArray[Any], state: NDArray[np.int64], events: Events
    ) -> tuple[int, int]:
        """Decodes `words` (n,) into `events`.

        Args:
            state: (STATE_SIZE,) carries on from block to block; zeros before the first.
            events: columns of length n * events_per_word.

        Returns:
            How many events came before the first time word, and how many there are in all.
        """
        raise NotImplementedError


class Writer(AbstractContextManager["Writer"]):
    """Writes events to a sensor file: in order of time, from 0 us on, inside the sensor."""

    largest_side: ClassVar[int] = 1 << 16  # pixels that the format can address
    earliest_us: ClassVar[int] = 0

    def __init__(self, path: Path, height: int, width: int) -> None:
        if max(height, width) > self.largest_side:
            raise RecordingError(
                f"{path}: a sensor of {width} x {height} does not fit {path.suffix}, which "
                f"addresses {self.largest_side} pixels a side. Write .h5"
            )
        self.path = path
        self.height = height
        self.width = width
        self.last_us = self.earliest_us

    def write(self, events: Events) -> None:
        """Appends events.

        Raises:
            RecordingError: times that run backwards or begin too early, pixels outside the sensor,
                or a polarity above 1.
        """
        if not events.t.size:
            return
        if events.t[0] < self.last_us or bool((events.t[1:] < events.t[:-1]).any()):
            raise RecordingError(
                f"{self.path}: events must come in order of time, from {self.last_us} us on; "
                f"these run from {events.t.min()} to {events.t.max()} us. Sort them first"
            )
        if events.x.max() >= self.width or events.y.max() >= self.height or events.p.max() > 1:
            raise RecordingError(
                f"{self.path}: events up to x {events.x.max()}, y {events.y.max()} and "
                f"p {events.p.max()} do not fit a sensor of {self.width} x {self.height} with "
                "p 0 and 1. Leave them out first"
            )
        self._write(events)
        self.last_us = int(events.t[-1])

    def _write(self, events: Events) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Completes the file."""
        raise NotImplementedError

    def __exit__(self, *_: object) -> None:
        self.close()
