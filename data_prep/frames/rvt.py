"""RVT's frames, bit for bit: where its preprocess_dataset.py ends windows, and how it counts (Gehrig & Scaramuzza 2023).

Windows are closed at both ends, so an event on a seam counts twice; bins stretch from the window's first event to its last;
counts wrap at 256 before they are cut at `cutoff`; frames end with the last label. For comparison with its published numbers.
"""

from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import pairwise
from typing import TypeVar

import numpy as np
from evspan.conf.errors import BoxesError
from evspan.conf.schema.prep import FrameConfig
from evspan.data_prep.frames.windows import FIRST_LABEL_US, TOLERANCE_US
from evspan.data_prep.recordings.base import Recording
from evspan.data_prep.recordings.events import no_events
from numba import njit
from numpy.typing import NDArray

PERIODS = {60: 6, 30: 3}  # labels a second -> labels between two that are taken, about 100 ms
Finished = TypeVar("Finished")


class RvtEnds:
    """The windows of a recording with these labels; the last one ends with a label. Iterated, their ends.

    labelled_us: (L,) int64, increasing: the labels that are taken, each of which ends a window.
    Raises:
        BoxesError: labels come neither 30 nor 60 times a second.
    """

    def __init__(self, label_times_us: NDArray[np.int64], window_us: int) -> None:
        taken = _taken(np.unique(label_times_us))
        self.labelled_us = np.array([time for time, _ in taken], np.int64)
        self.end_us: list[int] = []
        if taken:
            first = taken[0][0]
            # As many whole windows as fit between 0 and the first label, without the earliest.
            self.end_us = [
                first - window_us * k for k in range((first - 1) // window_us - 1, -1, -1)
            ]
        for (time, _), (following, periods) in pairwise(taken):
            self.end_us += (
                np.linspace(time, following, 2 * periods + 1)[1:].astype(np.int64).tolist()
            )

    def __iter__(self) -> Iterator[int]:
        return iter(self.end_us)

    def __len__(self) -> int:
        return len(self.end_us)


def _taken(times: NDArray[np.int64]) -> list[tuple[int, int]]:
    """(time, label distances of about 100 ms since the one before) of the labels that end a frame."""
    late = times[times >= FIRST_LABEL_US]
    if not late.size:
        return []
    if times.size == 1:
        return [(int(late[0]), 0)]
    median = float(np.median(np.diff(times)))
    hertz = int(np.rint(1e6 / median))
    if hertz not in PERIODS:
        raise BoxesError(
            f"labels come at {hertz} Hz; RVT's preparation knows 30 and 60 Hz. "
            "Use frames.mode=exact, which takes any"
        )
    base = int(PERIODS[hertz] * median)
    taken = [(int(late[0]), 0)]
    for time in late[1:].tolist():
        distance = time - taken[-1][0]
        periods = round(distance / base)
        if periods and abs(distance - periods * base) <= TOLERANCE_US:
            taken.append((time, periods))
    return taken


@njit(cache=True, nogil=True)
def _bin_begins(t, span, bins, b):
    """Index of the first event whose bin, in RVT's float32, is `b` or later; it grows with t."""
    low, high = 0, t.size
    while low < high:
        middle = (low + high) // 2
        if np.floor(np.float32(t[middle] - t[0]) / span * np.float32(bins)) < b:
            low = middle + 1
        else:
            high = middle
    return low


@njit(cache=True, nogil=True)
def _count(counts, t, x, y, p, cutoff, shift, keep):
    """Count all events into counts (2, bins, H >> shift, W >> shift) uint8, zeros; only pixels whose low bits are `keep`."""
    bins, height, width = (
        np.uint64(counts.shape[1]),
        np.uint64(counts.shape[2]),
        np.uint64(counts.shape[3]),
    )
    flat, shift, mask, kept = (
        counts.reshape(-1),
        np.uint64(shift),
        np.uint64((1 << shift) - 1),
        np.uint64(keep),
    )
    span = np.float32(max(t[t.size - 1] - t[0], 1))
    i = 0
    for b in range(counts.shape[1]):
        stop = t.size if b == counts.shape[1] - 1 else _bin_begins(t, span, counts.shape[1], b + 1)
        for j in range(i, stop):
            row, column = np.uint64(y[j]) >> shift, np.uint64(x[j]) >> shift
            if (
                row < height and column < width
            ):  # what is not kept adds 0: no branch that one event in four takes
                cell = ((np.uint64(p[j]) * bins + np.uint64(b)) * height + row) * width + column
                flat[cell] += np.uint8(((x[j] & mask) == kept) & ((y[j] & mask) == kept))  # wraps
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
    """`evspan.data_prep.frames.histogram.each_window` in mode rvt; the events of a window and a chunk are in memory."""
    shift, keep = config.downsample.bit_length() - 1, config.downsample // 2
    waiting = no_events()
    upcoming: Iterator[int] = iter(())
    finite, began, end = False, False, None

    def frame(end_us: int) -> tuple[int, Finished]:
        inside = waiting.take(
            slice(
                int(np.searchsorted(waiting.t, end_us - config.window_us)),
                int(np.searchsorted(waiting.t, end_us, side="right")),
            )
        )
        counts[:] = 0
        if inside.t.size:
            _count(counts, *inside, config.cutoff, shift, keep)
        return end_us, finish(counts)

    for events in recording.chunks():
        if not began:
            all_ends = ends(int(events.t[0]))
            upcoming, finite, began = iter(all_ends), isinstance(all_ends, Sized), True
            end = next(upcoming, None)
        waiting = waiting.followed_by(events) if waiting.t.size else events
        while end is not None and waiting.t[-1] > end:
            yield frame(end)
            end = next(upcoming, None)
        first = (
            waiting.t.size
            if end is None
            else int(np.searchsorted(waiting.t, end - config.window_us))
        )
        waiting = waiting.take(slice(first, None))
    while end is not None and (finite or end - config.window_us <= recording.last_us):
        yield frame(end)
        end = next(upcoming, None)
