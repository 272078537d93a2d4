"""What all readers have in common."""

from collections.abc import Iterator
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
    """

    format: str

    def __init__(self, path: Path, height: int, width: int) -> None:
        self.path, self.height, self.width = path, height, width
        self.dropped: dict[str, int] = {}

    def chunks(self) -> Iterator[Events]:
        """Events in file order, times unwrapped and non-decreasing, pixels inside the sensor.

        Raises:
            RecordingError: the file ends inside a word, or cannot be read.
        """
        self.dropped = {"outside_sensor": 0, "late_timestamps_raised": 0}
        latest = None
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
            latest = events.t[-1]
            yield events

    def _decoded(self) -> Iterator[Events]:
        raise NotImplementedError


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
        raise RecordingError(f"{path} is cut off: {over} byte{'s' if over > 1 else ''} too many at byte {size - over} of {size}, where a word of "
                             f"{word.itemsize} should follow. Copy it again, or keep its whole words: head -c {size - over}")
