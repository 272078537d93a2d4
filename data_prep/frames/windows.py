"""Where frames end: windows tile the recording, and a labelled frame ends at its label's time.

Example: windows of 50 ms, labels every 100 ms, the first event at 12 ms, and labels at 100, 133,
201, 340 and 860 ms. The label at 100 ms anchors the grid. 133 ms is too close to it and ends no
frame. 201 ms is 101 ms after it, a multiple of 100 ms within the tolerance of 2 ms: the two windows
before it are 50.5 ms long. 340 ms is 139 ms later, no multiple. 860 ms is 659 ms after 201 ms, no
multiple either, but the 13 windows between them can each be up to 2 ms longer or shorter, which
reaches any time: they are 659 / 13 = 50.7 ms long. The ends, * of labelled frames:

    50  100*  150.5  201*  251.7  302.4  ...  809.3  860*  910  960 ...
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

import numpy as np
from numpy.typing import NDArray

TOLERANCE_US = 2000
# In the recording's clock: RVT's first labelled frame is at the first label from here on.
FIRST_LABEL_US = 100_000


@dataclass(frozen=True)
class WindowEnds:
    """Ends of the half-open windows [previous end, end) that tile a recording. Infinite.

    The ends come one by one, so windows after the last event cost nothing.

    Attributes:
        first_us: time of the first event.
        window_us: nominal length of a window.
        labelled_us: (L,) the ends that are times of labels, in microseconds, increasing.
    """

    first_us: int
    window_us: int
    labelled_us: NDArray[np.int64]

    def __iter__(self) -> Iterator[int]:
        labels: list[int] = self.labelled_us.tolist()
        if not labels:
            yield from count(self.first_us + self.window_us, self.window_us)
            return
        # Whole windows between the first event and the window that ends at the first label.
        before = (labels[0] - self.first_us - 1) // self.window_us
        for k in range(before, -1, -1):
            yield labels[0] - k * self.window_us
        for label, next_label in pairwise(labels):
            windows = round((next_label - label) / self.window_us)
            length = (next_label - label) / windows
            for k in range(1, windows):
                yield int(k * length + label)  # to the microsecond as RVT's np.linspace
            yield next_label
        yield from count(labels[-1] + self.window_us, self.window_us)


def window_ends(
    label_times_us: NDArray[np.int64], first_us: int, *, window_us: int, label_every_us: int
) -> WindowEnds:
    """The windows of a recording; without labels the first one begins at the first event.

    One label anchors the grid: the first one at FIRST_LABEL_US or later. From there on, in both
    directions, labels are taken by RVT's rule: the distance to the last taken label is a multiple
    of `label_every_us`, within the tolerance, and the windows between them take equal parts of the
    difference. Labels that are irregular count, too: where no label fits for so long that the
    windows since the last one could take any difference, the next label is taken. No window
    differs from `window_us` by more than the tolerance.

    Args:
        label_times_us: (L,) times of annotations in microseconds, in any order, with repetitions.
            Those up to the first event are ignored.
        first_us: time of the first event.
    """
    times = np.unique(label_times_us)
    times = times[times > first_us]
    if not times.size:
        return WindowEnds(first_us, window_us, np.zeros(0, np.int64))
    anchor = times[min(int(np.searchsorted(times, FIRST_LABEL_US)), times.size - 1)]
    rule = LabelRule(window_us, label_every_us, _label_step(times, window_us, label_every_us))
    before = rule.taken((anchor - times[times < anchor])[::-1].tolist())
    after = rule.taken((times[times > anchor] - anchor).tolist())
    distances = [-distance for distance in reversed(before)] + [0] + after
    return WindowEnds(first_us, window_us, anchor + np.array(distances, np.int64))


def tolerance(window_us: int) -> int:
    """How much a window may differ from its nominal length, and a label from its place, in us.

    2 ms, or a quarter of the window if that is less.
    """
    return min(TOLERANCE_US, window_us // 4)


def _label_step(times: NDArray[np.int64], window_us: int, label_every_us: int) -> int:
    """Distance of the labels to take, in us: `label_every_us` in whole windows.

    Where the labels' own period has a multiple within the tolerance, it is that multiple: labels
    at 60 Hz, 16,667 us apart, are taken every 6 * 16,667 us = 100,002 us.
    """
    step = window_us * max(1, round(label_every_us / window_us))
    if times.size > 1:
        period = np.median(np.diff(times))
        multiple = int(period * max(1, round(step / period)))
        if abs(multiple - step) <= tolerance(window_us):
            return multiple
    return step


@dataclass(frozen=True)
class LabelRule:
    """Which labels end a frame. All times in microseconds.

    Attributes:
        window_us: nominal length of a window.
        label_every_us: labels that are closer to the last taken one are skipped.
        step_us: regular labels are multiples of it apart.
    """

    window_us: int
    label_every_us: int
    step_us: int

    def taken(self, distances: Sequence[int]) -> list[int]:
        """The labels that end a frame, as distances from the anchor.

        Args:
            distances: of all labels from the anchor, positive, increasing.

        Example (window 50 ms, label_every and step 100 ms): of the distances 33, 101, 240 and
        760 ms, 101 and 760 are taken. 33 is too close. 101 is one step. 240 is 139 after 101, no
        multiple of the step. 760 is 659 after 101, and 13 windows can absorb any difference.
        """
        slack = tolerance(self.window_us)
        shortest = max(self.label_every_us, self.window_us) - slack
        taken: list[int] = []
        last = 0
        for i, distance in enumerate(distances):
            gap = distance - last
            if gap < shortest:
                continue
            if not self._fits(gap):
                following = distances[i + 1 : bisect_right(distances, distance + self.step_us)]
                fitting_follows = any(self._fits(other - last) for other in following)
                if fitting_follows or not self._absorbs_any_difference(gap):
                    continue
            windows = round(gap / self.window_us)
            if abs(gap - windows * self.window_us) <= windows * slack:
                taken.append(distance)
                last = distance
        return taken

    def _fits(self, gap: int) -> bool:
        """Whether the gap is a multiple of the step, within the tolerance."""
        return abs(gap - round(gap / self.step_us) * self.step_us) <= tolerance(self.window_us)

    def _absorbs_any_difference(self, gap: int) -> bool:
        """Whether the windows of the gap could each be so much longer or shorter that any label
        would end one: together half a window or more."""
        windows = round(gap / self.window_us)
        return 2 * windows * tolerance(self.window_us) >= self.window_us
