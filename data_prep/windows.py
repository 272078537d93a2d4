"""Where frames end: windows tile the recording, and a labelled frame ends at its label's time."""

from collections.abc import Iterator
from itertools import chain, count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

TOLERANCE_US = 2000


class LabelledEnds(NamedTuple):
    """Window ends up to the last accepted label. end_us: (N,) int64, increasing. labelled: (N,) bool, the end is an accepted
    label time. unaligned, thinned: label times passed over, off the grid or closer than the wanted label distance."""

    end_us: NDArray[np.int64]
    labelled: NDArray[np.bool_]
    unaligned: int
    thinned: int

    def without_end(self, first_us: int, window_us: int) -> Iterator[int]:
        """These ends, then one every `window_us`; without labels the first window begins at the first event."""
        ends = self.end_us.tolist()
        return chain(ends, count((ends[-1] if ends else first_us) + window_us, window_us))


def labelled_ends(label_times_us: NDArray[np.int64], first_us: int, *, window_us: int, label_every_us: int,
                  tolerance_us: int = TOLERANCE_US) -> LabelledEnds:
    """Ends of the half-open windows [end before, this end) that tile a recording whose first event is at `first_us`.

    The first label after the first event anchors the grid: windows of `window_us` before it, back to the one that holds the
    first event. A later label is accepted where its distance from the last accepted one is within the tolerance of n windows,
    and not under `label_every_us`; the n windows in between share the difference, as RVT aligns them.

    Args:
        label_times_us: times of annotations, in any order, repeated or not; those up to the first event are ignored.
    """
    times = np.unique(label_times_us)
    times = times[times > first_us]
    if not times.size:
        return LabelledEnds(np.zeros(0, np.int64), np.zeros(0, bool), 0, 0)
    anchor = int(times[0])
    before = -(-(anchor - first_us) // window_us) - 1  # whole windows between the first event's and the anchor's own
    ends = [anchor - window_us * k for k in range(before, -1, -1)]
    accepted, unaligned, thinned = [before], 0, 0
    for time in times[1:].tolist():
        distance = time - ends[-1]
        windows = round(distance / window_us)
        if distance < label_every_us - tolerance_us or windows < 1:
            thinned += 1
        elif abs(distance - windows * window_us) > tolerance_us:
            unaligned += 1
        else:
            ends += np.linspace(ends[-1], time, windows + 1)[1:].astype(np.int64).tolist()
            accepted.append(len(ends) - 1)
    labelled = np.zeros(len(ends), bool)
    labelled[accepted] = True
    return LabelledEnds(np.array(ends, np.int64), labelled, unaligned, thinned)
