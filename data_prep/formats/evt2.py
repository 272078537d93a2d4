"""EVT2, the format of Gen3 cameras: 32-bit words, the type in the top 4 bits.

0x0 CD_OFF, 0x1 CD_ON (time's low 6 bits in 22..27, x in 11..21, y in 0..10), 0x8 TIME_HIGH (28 bits, << 6); others are skipped.
Time has 34 bits and wraps after 4.8 hours.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numba import njit

from data_prep.events import Events
from data_prep.formats.header import read_header, sensor_size
from data_prep.formats.recording import Recording, room_for, word_blocks

WORD = np.dtype("<u4")


@njit(cache=True, nogil=True)
def _decode(words, state, t, x, y, p):
    n = 0
    high, wraps, seen = state[0], state[1], state[2]
    for i in range(words.size):
        word = np.int64(words[i])
        kind = word >> 28
        if kind <= 1:
            t[n] = (((wraps << 28) | high) << 6) | ((word >> 22) & 0x3F)
            x[n], y[n], p[n] = (word >> 11) & 0x7FF, word & 0x7FF, kind
            n += 1
        elif kind == 0x8:
            value = word & 0xFFFFFFF
            if seen and value < high - (1 << 27):
                wraps += 1
            high, seen = value, 1
    state[0], state[1], state[2] = high, wraps, seen
    return n


class Evt2Reader(Recording):
    format = "evt2"

    def __init__(self, path: Path, block_bytes: int = 0) -> None:
        fields, self.start = read_header(path)
        self.block_bytes = block_bytes
        super().__init__(path, *sensor_size(path, fields))

    def _decoded(self) -> Iterator[Events]:
        state = np.zeros(3, np.int64)
        for words in word_blocks(self.path, self.start, WORD, self.block_bytes):
            events = room_for(words.size)
            yield events.take(slice(_decode(words, state, *events)))
