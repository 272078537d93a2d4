"""EVT2, the format of Gen3 cameras: 32-bit words, the type in the top 4 bits.

0x0 CD_OFF, 0x1 CD_ON (the low 6 bits of time in 22..27, x in 11..21, y in 0..10), 0x8 TIME_HIGH
(28 bits, << 6); others are skipped. Time has 34 bits and wraps after 4.8 hours.
"""

from typing import Any

import numpy as np
from evspan.data_prep.recordings.base import WordReader
from evspan.data_prep.recordings.events import Events
from numba import njit
from numpy.typing import NDArray

CD_ON = 0x1
TIME_HIGH = 0x8
HALF_HIGH_RANGE = 1 << 27  # of the 28 bits of TIME_HIGH

HIGH, WRAPS, SEEN = range(3)  # entries of the state; SEEN: a TIME_HIGH has come


@njit(cache=True, nogil=True)
def _decode(
    words: NDArray[np.uint32],
    state: NDArray[np.int64],
    t: NDArray[np.int64],
    x: NDArray[np.uint16],
    y: NDArray[np.uint16],
    p: NDArray[np.uint8],
) -> tuple[int, int]:
    """Decodes `words` (N,) into t, x, y, p (N,).

    Returns:
        How many events came before the first TIME_HIGH, and how many there are in all.
    """
    n = 0
    high = state[HIGH]
    wraps = state[WRAPS]
    seen = state[SEEN]
    timeless = 0
    for i in range(words.size):
        word = np.int64(words[i])
        kind = word >> 28
        if kind <= CD_ON:
            t[n] = (((wraps << 28) | high) << 6) | ((word >> 22) & 0x3F)
            x[n] = (word >> 11) & 0x7FF
            y[n] = word & 0x7FF
            p[n] = kind
            n += 1
        elif kind == TIME_HIGH:
            value = word & 0xFFFFFFF
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


class Evt2Reader(WordReader):
    """Reads EVT2."""

    format = "evt2"
    word = np.dtype("<u4")
    events_per_word = 1

    def _decode(
        self, words: NDArray[Any], state: NDArray[np.int64], events: Events
    ) -> tuple[int, int]:
        return _decode(words, state, *events)
