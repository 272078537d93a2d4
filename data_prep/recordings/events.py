"""Events as columns: what every reader returns and every writer takes."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Events(NamedTuple):
    """N events in recording order.

    t: (N,) microseconds, unwrapped, non-decreasing.
    x, y: (N,) pixel column and row, origin at the top left.
    p: (N,) 0 = darker, 1 = brighter.
    """

    t: NDArray[np.int64]
    x: NDArray[np.uint16]
    y: NDArray[np.uint16]
    p: NDArray[np.uint8]

    def take(self, which: slice | NDArray[Any]) -> "Events":
        """The events of a slice, mask or index array."""
        return Events(self.t[which], self.x[which], self.y[which], self.p[which])

    def followed_by(self, later: "Events") -> "Events":
        """These events and then the later ones, as new arrays."""
        return Events(
            np.concatenate((self.t, later.t)),
            np.concatenate((self.x, later.x)),
            np.concatenate((self.y, later.y)),
            np.concatenate((self.p, later.p)),
        )


def empty_events(size: int) -> Events:
    """`size` events with undefined values, to be filled."""
    return Events(
        np.empty(size, np.int64),
        np.empty(size, np.uint16),
        np.empty(size, np.uint16),
        np.empty(size, np.uint8),
    )


def no_events() -> Events:
    """Columns of length 0."""
    return empty_events(0)
