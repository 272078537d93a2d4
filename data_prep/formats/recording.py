"""What all readers have in common."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import RecordingError
from data_prep.events import Events

GEN4_SIZE = (720, 1280)
BLOCK_BYTES = 1 << 22


class Recording:
    """A sensor file. `chunks()` reads it from its beginning, as often as it is called, in bounded memory.

    height, width: the sensor's, in pixels. dropped: what the last complete `chunks()` left out or mended, by reason:
    `outside_sensor` events dropped, `late_timestamps_raised` events whose time ran backwards and was raised to the latest seen.
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
        self.dropped = {"outside_sensor": 0, "late_timestamps_raised": 0}
        self.events, latest = 0, None
        for events in self._decoded():
            inside = (events.x < self.width) & (events.y < self.height)
            if not inside.all():
                self.dropped["outside_sensor"] += int(inside.size - np.count_nonzero(inside))
                events = events.take(inside)
            if not events.t.size:
                continue
            if (latest is not None and events.t[0] < latest) or bool((events.t[1:] < events.t[:-1]).any()):
                raised = np.maximum.accumulate(events.t if latest is None else np.maximum(events.t, latest))
                self.dropped["late_timestamps_raised"] += int(np.count_nonzero(raised != events.t))
                events = events._replace(t=raised)
            if latest is None:
                self.first_us = int(events.t[0])
            latest = events.t[-1]
            self.last_us, self.events = int(latest), self.events + events.t.size
            for i in range(0, events.t.size, chunk_events):
                yield events.take(slice(i, i + chunk_events))

    def _decoded(self) -> Iterator[Events]:
        raise NotImplementedError


class Writer(AbstractContextManager["Writer"]):
    """Events to a sensor file, as they come: in order of time, from 0 us on."""

    def write(self, events: Events) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def __exit__(self, *_: object) -> None:
        self.close()


def room_for(n: int) -> Events:
    """Columns for n events that a decoder fills."""
    return Events(np.empty(n, np.int64), np.empty(n, np.uint16), np.empty(n, np.uint16), np.empty(n, np.uint8))


def word_blocks(path: Path, start: int, word: np.dtype, block_bytes: int = 0) -> Iterator[NDArray]:
    """The file from byte `start` on, in blocks of whole words. Raises RecordingError when the last word is cut off."""
    size = path.stat().st_size
    over = (size - start) % word.itemsize
    with path.open("rb") as file:
        file.seek(start)
        per_block = max(1, (block_bytes or BLOCK_BYTES) // word.itemsize)
        while (block := np.fromfile(file, word, per_block)).size:
            yield block
    if over:
        raise RecordingError(f"{path} is cut off: {over} byte{'s' if over > 1 else ''} too many at byte {size - over} of "
                             f"{size}, where a word of "
                             f"{word.itemsize} should follow. Copy it again, or keep its whole words: head -c {size - over}")
