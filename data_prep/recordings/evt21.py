"""EVT2.1: 64-bit words. The upper half is an EVT2 word, the lower half has a bit per pixel.

0x0 EVT_NEG, 0x1 EVT_POS (the low 6 bits of time in 54..59, x in 43..53, y in 32..42; bit i of
0..31: an event at x + i), 0x8 TIME_HIGH (28 bits in 32..59, << 6); others are skipped. Time has 34
bits and wraps after 4.8 hours. Words are little-endian; cameras up to IMX636 send the upper half
first ("legacy").
"""

from pathlib import Path
from typing import Any

import numpy as np
from evspan.conf.errors import RecordingError
from evspan.data_prep.recordings.base import BLOCK_BYTES, WordReader
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.header import format_options, system_number
from numba import njit
from numpy.typing import NDArray

FIRST_LITTLE_SYSTEM = 55  # system_IDs below are legacy where the header names no endianness
EVT_POS = 0x1
TIME_HIGH = 0x8
HALF_HIGH_RANGE = 1 << 27  # of the 28 bits of TIME_HIGH

HIGH, WRAPS, SEEN = range(3)  # entries of the state; SEEN: a TIME_HIGH has come


@njit(cache=True, nogil=True)
def _decode(
    halves: NDArray[np.uint32],
    upper_first: bool,
    state: NDArray[np.int64],
    t: NDArray[np.int64],
    x: NDArray[np.uint16],
    y: NDArray[np.uint16],
    p: NDArray[np.uint8],
) -> tuple[int, int]:
    """Decodes `halves` (2 * N,) into t, x, y, p (32 * N,).

    Returns:
        How many events came before the first TIME_HIGH, and how many there are in all.
    """
    n = 0
    high = state[HIGH]
    wraps = state[WRAPS]
    seen = state[SEEN]
    timeless = 0
    for i in range(0, halves.size, 2):
        upper = np.int64(halves[i + 1])
        pixels = np.int64(halves[i])
        if upper_first:
            upper, pixels = pixels, upper
        kind = upper >> 28
        if kind <= EVT_POS:
            now = (((wraps << 28) | high) << 6) | ((upper >> 22) & 0x3F)
            column = (upper >> 11) & 0x7FF
            while pixels:
                if pixels & 1:
                    t[n] = now
                    x[n] = column
                    y[n] = upper & 0x7FF
                    p[n] = kind
                    n += 1
                pixels >>= 1
                column += 1
        elif kind == TIME_HIGH:
            value = upper & 0xFFFFFFF
            if not seen:
                timeless = n
            # A fall of over half the range is a wrap, a smaller one is disorder.
            elif value < high - HALF_HIGH_RANGE:
                wraps += 1
            high = value
            seen = np.int64(1)
    if not seen:
        timeless = n
    state[HIGH] = high
    state[WRAPS] = wraps
    state[SEEN] = seen
    return timeless, n


class Evt21Reader(WordReader):
    """Reads EVT2.1 of both endiannesses."""

    format = "evt21"
    word = np.dtype("<u8")
    events_per_word = 32

    def __init__(self, path: Path, block_bytes: int = BLOCK_BYTES, **options: Any) -> None:
        super().__init__(path, block_bytes, **options)
        options = format_options(self.fields)
        endianness = options.get("endianness", self.fields.get("endianness", ""))
        order = endianness.lower()
        if not order:
            is_legacy = 0 < system_number(self.fields) < FIRST_LITTLE_SYSTEM
            order = "legacy" if is_legacy else "little"
        if order not in ("little", "legacy"):
            raise RecordingError(
                f"{path}: EVT2.1 words of endianness {endianness[:20]!r} cannot be read, only "
                f"little and legacy. Convert it: metavision_file_to_dat -i {path}"
            )
        self.upper_first = order == "legacy"

    def _decode(
        self, words: NDArray[Any], state: NDArray[np.int64], events: Events
    ) -> tuple[int, int]:
        return _decode(words.view("<u4"), self.upper_first, state, *events)
