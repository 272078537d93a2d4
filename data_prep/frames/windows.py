"""Where frames end: windows tile the recording, and a labelled frame ends at its label's time."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, pairwise

import numpy as np
from numpy.typing import NDArray

TOLERANCE_US = 2000
FIRST_LABEL_US = (
    100_000  # in the recording's clock: RVT's first labelled frame is the first one from here on
)


@dataclass(frozen=True)
class WindowEnds:
    """Ends of the half-open windows [end before, this end) that tile a recording, increasing and without end.

    Iterated, they come one by one: what lies after the last event costs nothing. labelled_us: (L,) int64, increasing, those
    that are times of labels.
    """

    first_us: int  # the first event
    window_us: int
    labelled_us: NDArray[np.int64]

    def __iter__(self) -> Iterator[int]:
        labels = self.labelled_us.tolist()
        whole = (
            (labels[0] - self.first_us - 1) // self.window_us if labels else 0
        )  # windows before the first label's own
        end = labels[0] if labels else self.first_us + self.window_us
        yield from range(end - whole * self.window_us, end + 1, self.window_us)
        for end, following in pairwise(labels):
            windows = round((following - end) / self.window_us)
            share = (following - end) / windows
            yield from (
                int(k * share + end) for k in range(1, windows)
            )  # to the microsecond what RVT's linspace gives
            yield following
        yield from count((labels[-1] if labels else end) + self.window_us, self.window_us)


def window_ends(
    label_times_us: NDArray[np.int64], first_us: int, *, window_us: int, label_every_us: int
) -> WindowEnds:
    """The windows of a recording whose first event is at `first_us`; without labels the first one begins there.

    One label anchors the grid of windows, and from it on, label after label is taken as RVT does it: its distance from the
    last one taken is a multiple of `label_every_us`, give or take the tolerance; the windows in between share the difference.
    Where none fits for so long that the windows since the last one can share any difference, the next label is taken as it
    comes, so that irregular labels count, too. No window is longer or shorter than `window_us` by more than the tolerance.

    Args:
        label_times_us: times of annotations, in any order, repeated or not; those up to the first event are ignored.
    """
    times = np.unique(label_times_us)
    times = times[times > first_us]
    taken = np.zeros(0, np.int64)
    if times.size:
        anchor = times[min(int(np.searchsorted(times, FIRST_LABEL_US)), times.size - 1)]
        step_us = _label_step(times, window_us, label_every_us)
        before = _taken((anchor - times[times < anchor])[::-1], window_us, label_every_us, step_us)
        after = _taken(times[times > anchor] - anchor, window_us, label_every_us, step_us)
        taken = anchor + np.array([-d for d in reversed(before)] + [0] + after, np.int64)
    return WindowEnds(first_us, window_us, taken)


def tolerance(window_us: int) -> int:
    """How far a window may be from its nominal length, and a label from its place: 2 ms, less for very short windows."""
    return min(TOLERANCE_US, window_us // 4)


def _label_step(times: NDArray[np.int64], window_us: int, label_every_us: int) -> int:
    """The wanted distance of labels in whole windows; where labels are regular, the multiple of their own period near it."""
    step = window_us * max(1, round(label_every_us / window_us))
    if times.size > 1:
        period = np.median(np.diff(times))
        own = int(period * max(1, round(step / period)))
        if abs(own - step) <= tolerance(window_us):
            return own
    return step


def _taken(
    distances: NDArray[np.int64], window_us: int, label_every_us: int, step_us: int
) -> list[int]:
    """Those of the increasing distances from the anchor at which a labelled frame ends."""
    slack, taken, last, left = tolerance(window_us), list[int](), 0, distances.tolist()

    def fits(distance: int) -> bool:
        return abs(distance - last - round((distance - last) / step_us) * step_us) <= slack

    for i, distance in enumerate(left):
        gap = distance - last
        if gap < max(label_every_us, window_us) - slack:
            continue
        windows = round(gap / window_us)
        sharable = windows * slack
        if not fits(distance):
            soon = left[i + 1 : bisect_right(left, distance + step_us)]
            if 2 * sharable < window_us or any(map(fits, soon)):
                continue
        if abs(gap - windows * window_us) <= sharable:
            taken.append(distance)
            last = distance
    return taken
