"""EVT3, the format of Gen4 cameras: 16-bit words, the type in the top 4 bits.

0x0 ADDR_Y, 0x2 ADDR_X (polarity in bit 11), 0x3 VECT_BASE_X (likewise), 0x4 VECT_12 and 0x5 VECT_8 (a bit per pixel from the
base on, which they advance), 0x6 TIME_LOW, 0x8 TIME_HIGH; other words (0xA external trigger, ...) are skipped.
Time is (TIME_HIGH << 12) | TIME_LOW: 24 bits that wrap every 16.78 s. A TIME_HIGH that differs from the last sets TIME_LOW to 0.
"""

from pathlib import Path

import numpy as np
from evspan.conf.errors import RecordingError
from evspan.data_prep.frames.codec import trailing_zeros
from evspan.data_prep.recordings.base import WordReader, Writer
from evspan.data_prep.recordings.events import Events
from numba import njit
from numpy.typing import NDArray

ONE = np.uint64(1)
FAR_OUTSIDE = 0x7FFF  # where the base of vectors stays that run past every sensor, so that it cannot wrap into one
LONGEST_GAP_US = 1 << 40  # 12.7 days, 512 KiB of time words


@njit(cache=True, nogil=True)
def _decode(words, state, t, x, y, p):
    n, i, size = (
        np.uint64(0),
        np.uint64(0),
        np.uint64(words.size),
    )  # unsigned: numba tests signed indices for being negative
    high, low, row, base, polarity, wraps, seen = (
        state[0],
        state[1],
        np.uint16(state[2]),
        state[3],
        state[4],
        state[5],
        state[6],
    )
    now = (wraps << 24) | (high << 12) | low
    timeless = np.int64(0 if seen else -1)
    while i < size:
        word = words[i]
        i += ONE
        kind, value = word >> 12, np.int64(word & 0xFFF)
        if kind == 0x0:
            row = word & np.uint16(0x7FF)
            if i == size or words[i] >> 12 != 0x2:
                continue
            word, kind = (
                words[i],
                0x2,
            )  # as a rule an event follows: taken at once, it saves a branch that cannot be foreseen
            i += ONE
        if kind == 0x2:
            t[n], x[n], y[n], p[n] = now, word & 0x7FF, row, (word >> 11) & 1
            n += ONE
        elif kind == 0x4 or kind == 0x5:
            width = 12 if kind == 0x4 else 8
            bits = np.uint64(value & ((1 << width) - 1))
            while bits:
                t[n], x[n], y[n], p[n] = now, base + np.int64(trailing_zeros(bits)), row, polarity
                n += ONE
                bits &= bits - ONE
            base = min(base + width, FAR_OUTSIDE)
        elif kind == 0x6:
            low = value
            now = (wraps << 24) | (high << 12) | low
        elif kind == 0x3:
            base, polarity = value & 0x7FF, value >> 11
        elif kind == 0x8:
            if not seen:
                timeless = np.int64(n)
            elif (
                value <= high - 2048
            ):  # a fall of half the range is a wrap, a smaller one is disorder
                wraps += 1
            if value != high or not seen:
                low = 0
            high, seen = value, 1
            now = (wraps << 24) | (high << 12) | low
    state[0], state[1], state[2], state[3], state[4], state[5], state[6] = (
        high,
        low,
        row,
        base,
        polarity,
        wraps,
        seen,
    )
    return (timeless if seen else np.int64(n)), np.int64(n)


class Evt3Reader(WordReader):
    format = "evt3"
    word = np.dtype("<u2")
    events_per_word = 12

    def _decode(self, words: NDArray, state: NDArray[np.int64], events: Events) -> tuple[int, int]:
        return _decode(words, state, *events)


@njit(cache=True, nogil=True)
def _encode(t, x, y, p, state, words):
    """Words of the events; returns how many. state: time (of the last words written; -1 before the first), row (-1: none)."""
    n = 0
    time, row = state[0], state[1]
    for i in range(t.size):
        if t[i] != time:
            high = t[i] >> 12
            last = time >> 12  # -1 before the first event, so that TIME_HIGH is written then too
            # Over a long gap a TIME_HIGH every quarter of its range, from 0 us on: readers count wraps by these.
            while high - last > 1024:
                last += 1024
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
    largest_side = 1 << 11

    def __init__(self, path: Path, height: int, width: int) -> None:
        super().__init__(path, height, width)
        self.file = path.open("wb")
        self.file.write(
            f"% evt 3.0\n% format EVT3;height={height};width={width}\n% geometry {width}x{height}\n% end\n".encode()
        )
        self.state = np.array([-1, -1], np.int64)

    def _write(self, events: Events) -> None:
        gaps = int(events.t[-1]) - self.last_us
        if gaps > LONGEST_GAP_US:
            raise RecordingError(
                f"{self.path}: events at {events.t[-1]} us, {gaps} us after those before, are too far apart for "
                "EVT3's clock of 16.8 s. Write .h5, or subtract the first event's time"
            )
        # At most TIME_HIGH, TIME_LOW, ADDR_Y and ADDR_X an event, and the steps over gaps.
        words = np.empty(4 * events.t.size + (gaps >> 21) + 8, Evt3Reader.word)
        self.file.write(words[: _encode(*events, self.state, words)].tobytes())

    def close(self) -> None:
        self.file.close()
