"""RVT's frames, bit for bit: window ends and counting of its preprocess_dataset.py.

Windows are closed at both ends, so an event at a seam counts twice; bins stretch from the first
event of a window to its last; counts wrap at 256 before they are cut at `cutoff`; frames end with
the last label. For comparison with RVT's published numbers (Gehrig & Scaramuzza, CVPR 2023).
"""

from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
from evspan.conf.errors import BoxesError
from evspan.conf.schema.prep import FrameConfig
from evspan.data_prep.frames.silence import refuse_silence
from evspan.data_prep.frames.windows import FIRST_LABEL_US, TOLERANCE_US
from evspan.data_prep.recordings.base import Recording
from evspan.data_prep.recordings.events import Events, no_events
from numba import njit
from numpy.typing import NDArray

PERIODS = {60: 6, 30: 3}  # labels per second -> periods of the labels in about 100 ms
Finished = TypeVar("Finished")


class TakenLabel(NamedTuple):
    """A label that ends a frame.

    Attributes:
        time_us: in the recording's clock.
        periods: distance from the taken label before, in units of about 100 ms.
    """

    time_us: int
    periods: int


class RvtEnds:
    """Ends of the windows of a recording, in microseconds. Finite: the last one is a label.

    The ends come one by one: labels on another clock may be decades after the last event.

    Args:
        label_times_us: (L,) times of annotations, in any order, with repetitions.

    Attributes:
        labelled_us: (K,) int64, increasing: the labels that are taken; each ends a window.

    Raises:
        BoxesError: labels come neither 30 nor 60 times a second.
    """

    def __init__(self, label_times_us: NDArray[np.int64], window_us: int) -> None:
        self.window_us = window_us
        self._taken = _taken(np.unique(label_times_us))
        self.labelled_us = np.array([label.time_us for label in self._taken], np.int64)

    @property
    def _windows_before(self) -> int:
        """As many whole windows as fit between 0 and the first label, without the earliest."""
        return (self._taken[0].time_us - 1) // self.window_us if self._taken else 0

    def __iter__(self) -> Iterator[int]:
        for k in range(self._windows_before - 1, -1, -1):
            yield self._taken[0].time_us - self.window_us * k
        for label, following in pairwise(self._taken):
            # As np.linspace computes them, to the last bit.
            windows = 2 * following.periods
            start = float(label.time_us)
            step = (float(following.time_us) - start) / windows
            for k in range(1, windows):
                yield int(k * step + start)
            yield following.time_us

    def __len__(self) -> int:
        return self._windows_before + 2 * sum(label.periods for label in self._taken)


def _taken(times: NDArray[np.int64]) -> list[TakenLabel]:
    """The labels that end a frame. times: (L,) increasing."""
    late = times[times >= FIRST_LABEL_US]
    if not late.size:
        return []
    taken = [TakenLabel(int(late[0]), 0)]
    if times.size == 1:
        return taken
    period = float(np.median(np.diff(times)))
    hertz = int(np.rint(1e6 / period))
    if hertz not in PERIODS:
        raise BoxesError(
            f"labels come at {hertz} Hz; RVT's preparation supports 30 and 60 Hz. "
            "Use frames.mode=exact, which supports any rate"
        )
    base = int(PERIODS[hertz] * period)
    for time in late[1:].tolist():
        distance = time - taken[-1].time_us
        periods = round(distance / base)
        if periods and abs(distance - periods * base) <= TOLERANCE_US:
            taken.append(TakenLabel(time, periods))
    return taken


@njit(cache=True, nogil=True)
def _bin_begins(t: NDArray[np.int64], span: np.float32, bins: int, b: int) -> int:
    """Index of the first event whose bin is `b` or later, by bisection.

    The bin of an event grows with t; it is computed in float32, as RVT does.

    Args:
        t: (N,) microseconds, sorted.
        span: from the first event to the last.
    """
    low = 0
    high = t.size
    while low < high:
        middle = (low + high) // 2
        if np.floor(np.float32(t[middle] - t[0]) / span * np.float32(bins)) < b:
            low = middle + 1
        else:
            high = middle
    return low


@njit(cache=True, nogil=True)
def _count(
    counts: NDArray[np.uint8],
    t: NDArray[np.int64],
    x: NDArray[np.uint16],
    y: NDArray[np.uint16],
    p: NDArray[np.uint8],
    cutoff: int,
    shift: int,
    keep: int,
) -> None:
    """Counts all events of a window.

    Args:
        counts: (2, bins, H >> shift, W >> shift) zeros, changed in place.
        t: (N,) microseconds, sorted; N > 0.
        x, y, p: (N,) columns of the events.
        shift: log2 of the downsampling.
        keep: only pixels whose low `shift` bits of x and of y are this value count.
    """
    bins = np.uint64(counts.shape[1])
    height = np.uint64(counts.shape[2])
    width = np.uint64(counts.shape[3])
    flat = counts.reshape(-1)
    bits = np.uint64(shift)
    low_bits = np.uint64((1 << shift) - 1)
    kept = np.uint64(keep)
    span = np.float32(max(t[t.size - 1] - t[0], 1))
    i = 0
    for b in range(counts.shape[1]):
        stop = t.size if b == counts.shape[1] - 1 else _bin_begins(t, span, counts.shape[1], b + 1)
        for j in range(i, stop):
            row = np.uint64(y[j]) >> bits
            column = np.uint64(x[j]) >> bits
            if row < height and column < width:
                # An event that is not kept adds 0: a branch would be mispredicted. Counts wrap.
                cell = ((np.uint64(p[j]) * bins + np.uint64(b)) * height + row) * width + column
                flat[cell] += np.uint8(((x[j] & low_bits) == kept) & ((y[j] & low_bits) == kept))
        i = stop
    for i in range(flat.size):
        flat[i] = min(flat[i], np.uint8(cutoff))


def rvt_frames(
    recording: Recording,
    ends: Callable[[int], Iterable[int]],
    config: FrameConfig,
    counts: NDArray[np.uint8],
    finish: Callable[[NDArray[np.uint8]], Finished],
) -> Iterator[tuple[int, Finished]]:
    """`evspan.data_prep.frames.histogram.each_window` in mode rvt.

    The events of one window and one chunk are in memory.

    Args:
        counts: (2, bins, H, W) buffer for the counts of a window.
    """
    shift = config.downsample.bit_length() - 1
    keep = config.downsample // 2
    waiting = no_events()  # events that belong to this window or later ones
    upcoming: Iterator[int] | None = None
    finite = False
    end: int | None = None  # of the current window; None: there are no more

    def frame(end_us: int, waiting: Events) -> tuple[int, Finished]:
        first = int(np.searchsorted(waiting.t, end_us - config.window_us))
        last = int(np.searchsorted(waiting.t, end_us, side="right"))
        counts[:] = 0
        if first < last:
            _count(counts, *waiting.take(slice(first, last)), config.cutoff, shift, keep)
        return end_us, finish(counts)

    for events in recording.chunks():
        if upcoming is None:
            window_ends = ends(int(events.t[0]))
            finite = isinstance(window_ends, Sized)
            upcoming = iter(window_ends)
            end = next(upcoming, None)
        waiting = waiting.followed_by(events) if waiting.t.size else events
        while end is not None and waiting.t[-1] > end:
            first = int(np.searchsorted(waiting.t, end - config.window_us))
            refuse_silence(recording, end, int(waiting.t[first]))
            yield frame(end, waiting)
            end = next(upcoming, None)
        if end is None:
            waiting = no_events()
        else:
            first = int(np.searchsorted(waiting.t, end - config.window_us))
            waiting = waiting.take(slice(first, None))
    while end is not None and (finite or end - config.window_us <= recording.last_us):
        yield frame(end, waiting)
        end = next(upcoming, None) if upcoming else None
