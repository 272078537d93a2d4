"""EVT3, the format of Gen4 cameras: 16-bit words, the type in the top 4 bits.

0x0 ADDR_Y, 0x2 ADDR_X (polarity in bit 11), 0x3 VECT_BASE_X (likewise), 0x4 VECT_12 and 0x5 VECT_8
(a bit per pixel from the base on, which they advance), 0x6 TIME_LOW, 0x8 TIME_HIGH; other words
(0xA external trigger, ...) are skipped.
Time is (TIME_HIGH << 12) | TIME_LOW: 24 bits that wrap every 16.78 s. A TIME_HIGH that differs from
the last sets TIME_LOW to 0.
"""

from pathlib import Path
from typing import Any

import numpy as np
from evspan.conf.errors import RecordingError
from evspan.data_prep.frames.codec import trailing_zeros
from evspan.data_prep.recordings.base import WordReader, Writer
from evspan.data_prep.recordings.events import Events
from numba import njit
from numpy.typing import NDArray

ADDR_Y = 0x0
ADDR_X = 0x2
VECT_BASE_X = 0x3
VECT_12 = 0x4
VECT_8 = 0x5
TIME_LOW = 0x6
TIME_HIGH = 0x8

ONE = np.uint64(1)
# Vectors that run past every sensor keep their base here, so that it cannot wrap into one.
FAR_OUTSIDE = 0x7FFF
HALF_HIGH_RANGE = 2048  # of the 12 bits of TIME_HIGH
QUARTER_HIGH_RANGE = 1024
LONGEST_GAP_US = 1 << 40  # 12.7 days, 512 KiB of time words

HIGH, LOW, ROW, BASE, POLARITY, WRAPS, SEEN = range(7)  # entries of the decoder's state
TIME, LAST_ROW = range(2)  # entries of the encoder's state


@njit(cache=True, nogil=True)
def _fill_vector(
    bits: np.uint64,
    now: int,
    base: int,
    row: np.uint16,
    polarity: int,
    n: np.uint64,
    t: NDArray[np.int64],
    x: NDArray[np.uint16],
    y: NDArray[np.uint16],
    p: NDArray[np.uint8],
) -> np.uint64:
    """Writes an event for every bit that is set, from index `n` on; returns the next index."""
    while bits:
        t[n] = now
        # numba passes the typing context.
        x[n] = base + np.int64(trailing_zeros(bits))  # type: ignore[call-arg]
        y[n] = row
        p[n] = polarity
        n += ONE
        bits &= bits - ONE
    return n


@njit(cache=True, nogil=True)
def _decode(
    words: NDArray[np.uint16],
    state: NDArray[np.int64],
    t: NDArray[np.int64],
    x: NDArray[np.uint16],
    y: NDArray[np.uint16],
    p: NDArray[np.uint8],
) -> tuple[int, int]:
    """Decodes `words` (N,) into t, x, y, p (12 * N,).

    Returns:
        How many events came before the first TIME_HIGH, and how many there are in all.
    """
    # Unsigned, since numba tests signed indices for being negative.
    n = np.uint64(0)
    i = np.uint64(0)
    size = np.uint64(words.size)
    high = state[HIGH]
    low = state[LOW]
    row = np.uint16(state[ROW])
    base = state[BASE]
    polarity = state[POLARITY]
    wraps = state[WRAPS]
    seen = state[SEEN]
    now = (wraps << 24) | (high << 12) | low
    timeless = np.int64(0)
    while i < size:
        word = words[i]
        i += ONE
        kind = word >> 12
        value = np.int64(word & 0xFFF)
        if kind == ADDR_Y:
            row = word & np.uint16(0x7FF)
            if i == size or words[i] >> 12 != ADDR_X:
                continue
            # As a rule an event follows. Taken at once, it saves an unpredictable branch.
            word = words[i]
            kind = np.uint16(ADDR_X)
            i += ONE
        if kind == ADDR_X:
            t[n] = now
            x[n] = word & 0x7FF
            y[n] = row
            p[n] = (word >> 11) & 1
            n += ONE
        elif kind in (VECT_12, VECT_8):
            width = 12 if kind == VECT_12 else 8
            bits = np.uint64(value & ((1 << width) - 1))
            n = _fill_vector(bits, now, base, row, polarity, n, t, x, y, p)
            base = min(base + width, FAR_OUTSIDE)
        elif kind == TIME_LOW:
            low = value
            now = (wraps << 24) | (high << 12) | low
        elif kind == VECT_BASE_X:
            base = value & 0x7FF
            polarity = value >> 11
        elif kind == TIME_HIGH:
            if not seen:
                timeless = np.int64(n)
            # A fall of half the range is a wrap, a smaller one is disorder.
            wraps += np.int64(seen and value <= high - HALF_HIGH_RANGE)
            low = low if seen and value == high else np.int64(0)
            high = value
            seen = np.int64(1)
            now = (wraps << 24) | (high << 12) | low
    state[HIGH] = high
    state[LOW] = low
    state[ROW] = row
    state[BASE] = base
    state[POLARITY] = polarity
    state[WRAPS] = wraps
    state[SEEN] = seen
    return int(timeless if seen else np.int64(n)), int(n)


class Evt3Reader(WordReader):
    """Reads EVT3."""

    format = "evt3"
    word = np.dtype("<u2")
    events_per_word = 12

    def _decode(
        self, words: NDArray[Any], state: NDArray[np.int64], events: Events
    ) -> tuple[int, int]:
        return _decode(words, state, *events)


@njit(cache=True, nogil=True)
def _encode(
    t: NDArray[np.int64],
    x: NDArray[np.uint16],
    y: NDArray[np.uint16],
    p: NDArray[np.uint8],
    state: NDArray[np.int64],
    words: NDArray[np.uint16],
) -> int:
    """Encodes t, x, y, p (N,) into `words`; returns how many words they take.

    Args:
        state: time in us of the last time words (-1 before the first), row (-1 before the first).
    """
    n = 0
    time = state[TIME]
    row = state[LAST_ROW]
    for i in range(t.size):
        if t[i] != time:
            high = t[i] >> 12
            last = time >> 12  # -1 before the first event, so that TIME_HIGH is written then, too
            # Over a long gap a TIME_HIGH every quarter of its range, from 0 us on: readers count
            # wraps by these.
            while high - last > QUARTER_HIGH_RANGE:
                last += QUARTER_HIGH_RANGE
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
    state[TIME] = time
    state[LAST_ROW] = row
    return n


class Evt3Writer(Writer):
    """Writes EVT3 without vectors: an ADDR_X word per event."""

    largest_side = 1 << 11

    def __init__(self, path: Path, height: int, width: int) -> None:
        super().__init__(path, height, width)
        self.file = path.open("wb")
        header = (
            f"% evt 3.0\n% format EVT3;height={height};width={width}\n"
            f"% geometry {width}x{height}\n% end\n"
        )
        self.file.write(header.encode())
        self.state = np.array([-1, -1], np.int64)

    def _write(self, events: Events) -> None:
        gap_us = int(events.t[-1]) - self.last_us
        if gap_us > LONGEST_GAP_US:
            raise RecordingError(
                f"{self.path}: events at {events.t[-1]} us, {gap_us} us after those before, are "
                "too far apart for the clock of EVT3, which wraps after 16.8 s. Write .h5, or "
                "subtract the first event's time"
            )
        # At most TIME_HIGH, TIME_LOW, ADDR_Y and ADDR_X an event, and the steps over gaps.
        words = np.empty(4 * events.t.size + (gap_us >> 21) + 8, Evt3Reader.word)
        num_words = _encode(*events, self.state, words)
        self.file.write(words[:num_words].tobytes())

    def close(self) -> None:
        """Closes the file."""
        self.file.close()
