"""Events as columns, the one form in which every reader hands them on and every writer takes them."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Events(NamedTuple):
    """N events in recording order (`t.size` of them).

    t: (N,) int64, microseconds, unwrapped, non-decreasing. x, y: (N,) uint16, pixel column and row, origin top left.
    p: (N,) uint8, 0 = darker, 1 = brighter.
    """

    t: NDArray[np.int64]
    x: NDArray[np.uint16]
    y: NDArray[np.uint16]
    p: NDArray[np.uint8]

    def take(self, which: slice | NDArray) -> "Events":
        """The events of a slice, mask or index array."""
        return Events(self.t[which], self.x[which], self.y[which], self.p[which])

    def followed_by(self, later: "Events") -> "Events":
        return Events(
            np.concatenate((self.t, later.t)),
            np.concatenate((self.x, later.x)),
            np.concatenate((self.y, later.y)),
            np.concatenate((self.p, later.p)),
        )


def no_events() -> Events:
    return Events(
        np.zeros(0, np.int64), np.zeros(0, np.uint16), np.zeros(0, np.uint16), np.zeros(0, np.uint8)
    )
