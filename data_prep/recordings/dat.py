"""`.dat` of Prophesee's datasets: a text header, two bytes, then 8 bytes an event.

The two bytes are the event type and the size of an event. An event is
uint32 t in us (wraps after 71.6 minutes), uint32 with x in bits 0..13, y in 14..27, polarity in
28..31.
"""

from pathlib import Path
from typing import Any

import numpy as np
from evspan.conf.errors import RecordingError
from evspan.data_prep.recordings.base import BLOCK_BYTES, WordReader, Writer
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.header import HD
from numba import njit
from numpy.typing import NDArray

CD_TYPES = (0x00, 0x0C)  # 2D events, and CD events of later recorders; one layout
TRIGGER_TYPE = 0x0E
EVENT_SIZE = 8
CLOCK_RANGE = 1 << 32  # us
HALF_CLOCK_RANGE = 1 << 31

LAST, WRAPS = range(2)  # entries of the state


@njit(cache=True, nogil=True)
def _decode(
    halves: NDArray[np.uint32],
    state: NDArray[np.int64],
    t: NDArray[np.int64],
    x: NDArray[np.uint16],
    y: NDArray[np.uint16],
    p: NDArray[np.uint8],
) -> None:
    """Decodes `halves` (2 * N,) into t, x, y, p (N,)."""
    last = state[LAST]
    wraps = state[WRAPS]
    for i in range(t.size):
        now = np.int64(halves[2 * i])
        xyp = np.int64(halves[2 * i + 1])
        # A fall of over half the range is a wrap, a smaller one is disorder.
        if now < last - HALF_CLOCK_RANGE:
            wraps += 1
        last = now
        t[i] = (wraps << 32) | now
        x[i] = xyp & 0x3FFF
        y[i] = (xyp >> 14) & 0x3FFF
        p[i] = (xyp >> 28) != 0
    state[LAST] = last
    state[WRAPS] = wraps


class DatReader(WordReader):
    """Reads CD events."""

    format = "dat"
    word = np.dtype("<u8")
    events_per_word = 1
    default_size = HD

    def __init__(self, path: Path, block_bytes: int = BLOCK_BYTES, **options: Any) -> None:
        super().__init__(path, block_bytes, **options)
        with path.open("rb") as file:
            file.seek(self.start)
            layout = file.read(2)
        if layout[:1] == bytes([TRIGGER_TYPE]):
            raise RecordingError(
                f"{path} contains external triggers (event type 14 at byte {self.start}), no "
                "events of the sensor. The recording itself has event type 0 or 12, often in a "
                "file X_td.dat: give that one"
            )
        if len(layout) < 2 or layout[0] not in CD_TYPES or layout[1] != EVENT_SIZE:
            raise RecordingError(
                f"{path}: byte {self.start} should hold event type 0 or 12 and event size 8, but "
                f"holds {list(layout)}. Only CD events can be read; is this a .dat of another "
                "sensor?"
            )
        self.start += 2

    def _decode(
        self, words: NDArray[Any], state: NDArray[np.int64], events: Events
    ) -> tuple[int, int]:
        _decode(words.view("<u4"), state, *events)
        return 0, words.size


class DatWriter(Writer):
    """Writes CD events. The format cannot represent a gap of over 35 minutes."""

    largest_side = 1 << 14

    def __init__(self, path: Path, height: int, width: int) -> None:
        super().__init__(path, height, width)
        self.empty = True
        self.file = path.open("wb")
        header = (
            f"% Data file containing CD events.\n% Version 2\n% Height {height}\n% Width {width}\n"
        )
        self.file.write(header.encode() + bytes((CD_TYPES[1], EVENT_SIZE)))

    def _write(self, events: Events) -> None:
        if self.empty and events.t[0] >= CLOCK_RANGE:
            raise RecordingError(
                f"{self.path}: the first event is at {events.t[0]} us, past the 71.6 minutes of "
                "the clock of .dat. Write .h5"
            )
        before = events.t[0] if self.empty else self.last_us
        if np.diff(events.t, prepend=before).max() >= HALF_CLOCK_RANGE:
            raise RecordingError(
                f"{self.path}: two events lie over 35 minutes apart, which the 32-bit clock of "
                ".dat cannot represent. Write .h5"
            )
        self.empty = False
        halves = np.empty((events.t.size, 2), "<u4")
        halves[:, 0] = events.t & 0xFFFFFFFF
        x = events.x.astype(np.uint32)
        y = events.y.astype(np.uint32)
        p = events.p.astype(np.uint32)
        halves[:, 1] = x | y << 14 | p << 28
        self.file.write(halves.tobytes())

    def close(self) -> None:
        """Closes the file."""
        self.file.close()
