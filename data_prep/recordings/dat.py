"""`.dat` of Prophesee's datasets: a text header, two bytes (event type, event size), then 8 bytes an event.

uint32 t in us (wraps after 71.6 minutes), uint32 with x in bits 0..13, y in 14..27, polarity in 28..31.
"""

from pathlib import Path

import numpy as np
from evspan.conf.errors import RecordingError
from evspan.data_prep.recordings.base import GEN4_SIZE, WordReader, Writer
from evspan.data_prep.recordings.events import Events
from numba import njit
from numpy.typing import NDArray

CD_TYPES = (0x00, 0x0C)  # 2D events, and CD events of later recorders; one layout
EVENT_SIZE = 8


@njit(cache=True, nogil=True)
def _decode(halves, state, t, x, y, p):
    last, wraps = state[0], state[1]
    for i in range(t.size):
        now, xyp = np.int64(halves[2 * i]), np.int64(halves[2 * i + 1])
        if now < last - (
            1 << 31
        ):  # a fall of over half the range is a wrap, a smaller one is disorder
            wraps += 1
        last = now
        t[i], x[i], y[i], p[i] = (
            (wraps << 32) | now,
            xyp & 0x3FFF,
            (xyp >> 14) & 0x3FFF,
            (xyp >> 28) != 0,
        )
    state[0], state[1] = last, wraps


class DatReader(WordReader):
    format = "dat"
    word = np.dtype("<u8")
    events_per_word = 1
    default_size = GEN4_SIZE

    def __init__(self, path: Path, block_bytes: int = 1 << 18) -> None:
        super().__init__(path, block_bytes)
        with path.open("rb") as file:
            file.seek(self.start)
            told = file.read(2)
        if len(told) < 2 or told[0] not in CD_TYPES or told[1] != EVENT_SIZE:
            raise RecordingError(
                f"{path}: byte {self.start} should say event type 0 or 12 and event size 8, but says "
                f"{list(told)}. Only CD events can be read; is this a .dat of another sensor?"
            )
        self.start += 2

    def _decode(self, words: NDArray, state: NDArray[np.int64], events: Events) -> tuple[int, int]:
        _decode(words.view("<u4"), state, *events)
        return 0, words.size


class DatWriter(Writer):
    """A gap of over 35 minutes cannot be told."""

    largest_side = 1 << 14

    def __init__(self, path: Path, height: int, width: int) -> None:
        super().__init__(path, height, width)
        self.empty = True
        self.file = path.open("wb")
        header = (
            f"% Data file containing CD events.\n% Version 2\n% Height {height}\n% Width {width}\n"
        )
        self.file.write(header.encode() + bytes((0x0C, EVENT_SIZE)))

    def _write(self, events: Events) -> None:
        if self.empty and events.t[0] >= 1 << 32:
            raise RecordingError(
                f"{self.path}: the first event is at {events.t[0]} us, past the 71.6 minutes of .dat's clock. "
                "Write .h5"
            )
        if np.diff(events.t, prepend=events.t[0] if self.empty else self.last_us).max() >= 1 << 31:
            raise RecordingError(
                f"{self.path}: two events lie over 35 minutes apart, which .dat's 32-bit clock cannot tell. "
                "Write .h5"
            )
        self.empty = False
        halves = np.empty((events.t.size, 2), "<u4")
        halves[:, 0] = events.t & 0xFFFFFFFF
        halves[:, 1] = (
            events.x.astype(np.uint32)
            | events.y.astype(np.uint32) << 14
            | events.p.astype(np.uint32) << 28
        )
        self.file.write(halves.tobytes())

    def close(self) -> None:
        self.file.close()
