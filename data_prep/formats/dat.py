"""`.dat` of Prophesee's datasets: a text header, two bytes (event type, event size), then 8 bytes an event.

uint32 t in us (wraps after 71.6 minutes), uint32 with x in bits 0..13, y in 14..27, polarity in 28..31.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_prep.errors import RecordingError
from data_prep.events import Events
from data_prep.formats.header import read_header, sensor_size
from data_prep.formats.recording import GEN4_SIZE, Recording, Writer, word_blocks

WORD = np.dtype([("t", "<u4"), ("xyp", "<u4")])
CD_TYPES = (0x00, 0x0C)  # 2D events, and CD events of later recorders; one layout
EVENT_SIZE = 8


class DatReader(Recording):
    format = "dat"

    def __init__(self, path: Path, block_bytes: int = 0) -> None:
        fields, length = read_header(path)
        with path.open("rb") as file:
            file.seek(length)
            told = file.read(2)
        if len(told) < 2 or told[0] not in CD_TYPES or told[1] != EVENT_SIZE:
            raise RecordingError(f"{path}: byte {length} should say event type 0 or 12 and event size 8, but says {list(told)}. "
                                 "Only CD events can be read; is this a .dat of another sensor?")
        self.start, self.block_bytes = length + 2, block_bytes
        super().__init__(path, *sensor_size(path, fields, GEN4_SIZE))

    def _decoded(self) -> Iterator[Events]:
        last, wraps = 0, 0
        for words in word_blocks(self.path, self.start, WORD, self.block_bytes):
            t = words["t"].astype(np.int64)
            falls = np.diff(t, prepend=last) < -(1 << 31)  # a fall of over half the range is a wrap
            last = int(t[-1])
            t += (wraps + np.cumsum(falls)) << 32
            wraps += int(falls.sum())
            xyp = words["xyp"]
            x, y, p = xyp & 0x3FFF, xyp >> 14 & 0x3FFF, xyp >> 28 != 0
            yield Events(t, x.astype(np.uint16), y.astype(np.uint16), p.astype(np.uint8))


class DatWriter(Writer):
    """Events to a .dat file; times from 0 us on, in order, a gap of over 35 minutes cannot be told."""

    def __init__(self, path: Path, height: int, width: int) -> None:
        self.path = path
        self.last: int | None = None
        self.file = path.open("wb")
        header = f"% Data file containing CD events.\n% Version 2\n% Height {height}\n% Width {width}\n"
        self.file.write(header.encode() + bytes((0x0C, EVENT_SIZE)))

    def write(self, events: Events) -> None:
        if not events.t.size:
            return
        if events.t[0] >= 1 << 32 and self.last is None:
            raise RecordingError(f"{self.path}: the first event is at {events.t[0]} us, past the 71.6 minutes of .dat's clock. "
                                 "Write .h5")
        if np.diff(events.t, prepend=events.t[0] if self.last is None else self.last).max() >= 1 << 31:
            raise RecordingError(f"{self.path}: two events lie over 35 minutes apart, which .dat's 32-bit clock cannot tell. "
                                 "Write .h5")
        self.last = int(events.t[-1])
        words = np.empty(events.t.size, WORD)
        words["t"] = events.t & 0xFFFFFFFF
        words["xyp"] = events.x.astype(np.uint32) | events.y.astype(np.uint32) << 14 | events.p.astype(np.uint32) << 28
        self.file.write(words.tobytes())

    def close(self) -> None:
        self.file.close()
