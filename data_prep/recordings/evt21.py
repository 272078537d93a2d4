"""EVT2.1: 64-bit words. The upper half is an EVT2 word (the type in the top 4 bits), the lower half a bit per pixel from x on.

0x0 EVT_NEG, 0x1 EVT_POS (time's low 6 bits in 54..59, x in 43..53, y in 32..42, pixels in 0..31), 0x8 TIME_HIGH (28 bits in
32..59, << 6); others are skipped. Time has 34 bits and wraps after 4.8 hours.
Words are little-endian; cameras up to IMX636 send the upper half first ("legacy").
"""

from pathlib import Path

import numpy as np
from evspan.conf.errors import RecordingError
from evspan.data_prep.recordings.base import WordReader
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.header import format_options, system_number
from numba import njit
from numpy.typing import NDArray

FIRST_LITTLE_SYSTEM = 55  # system_IDs below are legacy where the header does not say


@njit(cache=True, nogil=True)
def _decode(halves, upper_first, state, t, x, y, p):
    n = 0
    high, wraps, seen = state[0], state[1], state[2]
    timeless = 0 if seen else -1
    for i in range(0, halves.size, 2):
        upper, pixels = np.int64(halves[i + 1]), np.int64(halves[i])
        if upper_first:
            upper, pixels = pixels, upper
        kind = upper >> 28
        if kind <= 1:
            now = (((wraps << 28) | high) << 6) | ((upper >> 22) & 0x3F)
            column = (upper >> 11) & 0x7FF
            while pixels:
                if pixels & 1:
                    t[n], x[n], y[n], p[n] = now, column, upper & 0x7FF, kind
                    n += 1
                pixels >>= 1
                column += 1
        elif kind == 0x8:
            value = upper & 0xFFFFFFF
            if not seen:
                timeless = n
            elif value < high - (
                1 << 27
            ):  # a fall of over half the range is a wrap, a smaller one is disorder
                wraps += 1
            high, seen = value, 1
    state[0], state[1], state[2] = high, wraps, seen
    return (timeless if seen else n), n


class Evt21Reader(WordReader):
    format = "evt21"
    word = np.dtype("<u8")
    events_per_word = 32

    def __init__(self, path: Path, block_bytes: int = 1 << 18) -> None:
        super().__init__(path, block_bytes)
        told = format_options(self.fields).get("endianness", self.fields.get("endianness", ""))
        order = told.lower() or (
            "legacy" if 0 < system_number(self.fields) < FIRST_LITTLE_SYSTEM else "little"
        )
        if order not in ("little", "legacy"):
            raise RecordingError(
                f"{path}: EVT2.1 words of endianness {told[:20]!r} cannot be read, only little and legacy. "
                f"Convert it: metavision_file_to_dat -i {path}"
            )
        self.upper_first = order == "legacy"

    def _decode(self, words: NDArray, state: NDArray[np.int64], events: Events) -> tuple[int, int]:
        return _decode(words.view("<u4"), self.upper_first, state, *events)
