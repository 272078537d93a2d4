"""EVT3, the format of Gen4 cameras: 16-bit words, the type in the top 4 bits.

0x0 ADDR_Y, 0x2 ADDR_X (polarity in bit 11), 0x3 VECT_BASE_X (likewise), 0x4 VECT_12 and 0x5 VECT_8 (a bit per pixel from the
base on, which they advance), 0x6 TIME_LOW, 0x8 TIME_HIGH; other words (0xA external trigger, ...) are skipped.
Time is (TIME_HIGH << 12) | TIME_LOW as last seen: 24 bits that wrap every 16.78 s.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numba import njit

from data_prep.events import Events
from data_prep.formats.header import read_header, sensor_size
from data_prep.formats.recording import Recording, Writer, room_for, word_blocks

WORD = np.dtype("<u2")
BLOCK_BYTES = 1 << 20  # a word makes up to 12 events
TIME_HIGH, TIME_LOW, ADDR_Y, BASE_X, POLARITY, WRAPS, SEEN_TIME, STATE_SIZE = range(8)


@njit(cache=True, nogil=True)
def _decode(words, state, t, x, y, p):
    """Events of `words` into the columns; returns how many. `state` carries on to the next block."""
    n = 0
    high, low, row, base, polarity, wraps, seen = state[0], state[1], state[2], state[3], state[4], state[5], state[6]
    now = (wraps << 24) | (high << 12) | low
    for i in range(words.size):
        word = np.int64(words[i])
        kind, value = word >> 12, word & 0xFFF
        if kind == 0x2:
            t[n], x[n], y[n], p[n] = now, word & 0x7FF, row, (word >> 11) & 1
            n += 1
        elif kind == 0x4 or kind == 0x5:
            width = 12 if kind == 0x4 else 8
            bits = value & ((1 << width) - 1)
            column = base
            while bits:
                if bits & 1:
                    t[n], x[n], y[n], p[n] = now, column, row, polarity
                    n += 1
                bits >>= 1
                column += 1
            base += width
        elif kind == 0x6:
            low = value
            now = (wraps << 24) | (high << 12) | low
        elif kind == 0x0:
            row = value & 0x7FF
        elif kind == 0x3:
            base, polarity = word & 0x7FF, (word >> 11) & 1
        elif kind == 0x8:
            if seen and value < high - 2048:  # a fall of over half the range is a wrap, a smaller one is disorder
                wraps += 1
            high, seen = value, 1
            now = (wraps << 24) | (high << 12) | low
    state[0], state[1], state[2], state[3], state[4], state[5], state[6] = high, low, row, base, polarity, wraps, seen
    return n


class Evt3Reader(Recording):
    format = "evt3"

    def __init__(self, path: Path, block_bytes: int = BLOCK_BYTES) -> None:
        fields, self.start = read_header(path)
        self.block_bytes = block_bytes
        super().__init__(path, *sensor_size(path, fields))

    def _decoded(self) -> Iterator[Events]:
        state = np.zeros(STATE_SIZE, np.int64)
        for words in word_blocks(self.path, self.start, WORD, self.block_bytes):
            events = room_for(12 * words.size)
            yield events.take(slice(_decode(words, state, *events)))


@njit(cache=True, nogil=True)
def _encode(t, x, y, p, state, words):
    """Words of the events; returns how many. state: time (of the last words written; -1 before the first), row (-1: none)."""
    n = 0
    time, row = state[0], state[1]
    for i in range(t.size):
        if t[i] != time:
            high = t[i] >> 12
            last = time >> 12  # -1 before the first event, so that TIME_HIGH is written then too
            # Over a long gap a TIME_HIGH every quarter of its range, from 0 us on: readers count wraps by them.
            while high - last > 1024:
                last = max(last, 0) + 1024
                words[n] = 0x8000 | (last & 0xFFF)
                n += 1
            if high != last:
                words[n] = 0x8000 | (high & 0xFFF)
                n += 1
            words[n] = 0x6000 | (t[i] & 0xFFF)
            n += 1
            time = t[i]
        if y[i] != row:
            row = y[i]
            words[n] = row
            n += 1
        words[n] = 0x2000 | (np.int64(p[i]) << 11) | x[i]
        n += 1
    state[0], state[1] = time, row
    return n


class Evt3Writer(Writer):
    """Events to an EVT3 file; times from 0 us on, in order."""

    def __init__(self, path: Path, height: int, width: int) -> None:
        self.file = path.open("wb")
        self.file.write(f"% evt 3.0\n% format EVT3;height={height};width={width}\n% geometry {width}x{height}\n% end\n".encode())
        self.state = np.array([-1, -1], np.int64)

    def write(self, events: Events) -> None:
        if not events.t.size:
            return
        # At most TIME_HIGH, TIME_LOW, ADDR_Y and ADDR_X an event, and the steps over gaps.
        gaps = int(events.t[-1] - max(self.state[0], 0)) >> 21
        words = np.empty(4 * events.t.size + gaps + 8, WORD)
        self.file.write(words[: _encode(*events, self.state, words)].tobytes())

    def close(self) -> None:
        self.file.close()
