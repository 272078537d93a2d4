"""EVT2, the format of Gen3 cameras: 32-bit words, the type in the top 4 bits.

0x0 CD_OFF, 0x1 CD_ON (time's low 6 bits in 22..27, x in 11..21, y in 0..10), 0x8 TIME_HIGH (28 bits, << 6); others are skipped.
Time has 34 bits and wraps after 4.8 hours.
"""

import numpy as np
from evspan.data_prep.recordings.base import WordReader
from evspan.data_prep.recordings.events import Events
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, nogil=True)
def _decode(words, state, t, x, y, p):
    n = 0
    high, wraps, seen = state[0], state[1], state[2]
    timeless = 0 if seen else -1
    for i in range(words.size):
        word = np.int64(words[i])
        kind = word >> 28
        if kind <= 1:
            t[n] = (((wraps << 28) | high) << 6) | ((word >> 22) & 0x3F)
            x[n], y[n], p[n] = (word >> 11) & 0x7FF, word & 0x7FF, kind
            n += 1
        elif kind == 0x8:
            value = word & 0xFFFFFFF
            if not seen:
                timeless = n
            elif value < high - (
                1 << 27
            ):  # a fall of over half the range is a wrap, a smaller one is disorder
                wraps += 1
            high, seen = value, 1
    state[0], state[1], state[2] = high, wraps, seen
    return (timeless if seen else n), n


class Evt2Reader(WordReader):
    format = "evt2"
    word = np.dtype("<u4")
    events_per_word = 1

    def _decode(self, words: NDArray, state: NDArray[np.int64], events: Events) -> tuple[int, int]:
        return _decode(words, state, *events)
