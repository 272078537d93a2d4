"""Counts events into frames (2 * bins, H, W) uint8; channel = polarity * bins + bin."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from evspan.conf.schema.prep import DownsampleBy, FrameConfig, FrameMode
from evspan.data_prep.frames.rvt import rvt_frames
from evspan.data_prep.frames.silence import refuse_silence
from evspan.data_prep.recordings.base import Recording
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, nogil=True)
def accumulate(
    counts: NDArray[np.uint8],
    t: NDArray[np.int64],
    x: NDArray[np.uint16],
    y: NDArray[np.uint16],
    p: NDArray[np.uint8],
    first: int,
    start: int,
    end: int,
    cutoff: int,
    shift: int,
    keep: int,
) -> int:
    """Counts the events from index `first` on that lie in [start, end).

    Args:
        counts: (2, bins, H >> shift, W >> shift), changed in place, saturating at `cutoff`.
        t: (N,) microseconds, sorted.
        x, y, p: (N,) columns of the events.
        start, end: of the window in microseconds; bins tile it in integers.
        shift: log2 of the downsampling.
        keep: -1: all pixels of a block add up; else only those whose low `shift` bits of x and of
            y are `keep`.

    Returns:
        Index of the next event.
    """
    # No division and no unpredictable branch per event: the events of a bin lie between two
    # indices, and an event that is not kept adds 0. Indices are unsigned, because numba tests
    # whether signed ones are negative.
    bins = np.uint64(counts.shape[1])
    height = np.uint64(counts.shape[2])
    width = np.uint64(counts.shape[3])
    flat = counts.reshape(-1)
    low_bits = np.uint64((1 << shift) - 1)
    bits = np.uint64(shift)
    keep_all = keep < 0
    kept = np.uint64(max(keep, 0))
    top = np.uint8(cutoff)
    span = end - start
    i = first + np.searchsorted(t[first:], start)
    for b in range(counts.shape[1]):
        stop = i + np.searchsorted(
            t[i:], start + ((b + 1) * span + counts.shape[1] - 1) // counts.shape[1]
        )
        for j in range(i, stop):
            row = np.uint64(y[j]) >> bits
            column = np.uint64(x[j]) >> bits
            if row < height and column < width:
                cell = ((np.uint64(p[j]) * bins + np.uint64(b)) * height + row) * width + column
                counted = keep_all | (((x[j] & low_bits) == kept) & ((y[j] & low_bits) == kept))
                flat[cell] += np.uint8(counted & (flat[cell] < top))
        i = stop
    return int(i)


def frame_size(config: FrameConfig, height: int, width: int) -> tuple[int, int]:
    """(H, W) of the frames of a sensor, in pixels; rows and columns that fill no block are cut."""
    return height // config.downsample, width // config.downsample


def whole_frame(counts: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Copies counts (2, bins, H, W) as a frame (2 * bins, H, W)."""
    return counts.reshape(-1, *counts.shape[2:]).copy()


Finished = TypeVar("Finished")


def frames_of(
    recording: Recording, ends: Callable[[int], Iterable[int]], config: FrameConfig
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yields (end_us, frame) of every window, frames (2 * bins, H, W); see `each_window`."""
    return each_window(recording, ends, config, whole_frame)


def each_window(
    recording: Recording,
    ends: Callable[[int], Iterable[int]],
    config: FrameConfig,
    finish: Callable[[NDArray[np.uint8]], Finished],
) -> Iterator[tuple[int, Finished]]:
    """Counts the events of every window up to the last event.

    One pass over the recording, with one frame in memory.

    Args:
        ends: returns the ends of the windows in microseconds, increasing, for the time of the
            first event. They are infinite. A window is [previous end, end), the first one is
            `config.window_us` long. In mode rvt a window is [end - window, end], and ends that
            have a length (`Sized`) are finite: all of them get a frame.
        finish: converts the counts (2, bins, H, W) of a window, which are then zeroed.

    Yields:
        (end_us, result of `finish`).

    Raises:
        RecordingError: there are no events for an hour or more.
    """
    height, width = frame_size(config, recording.height, recording.width)
    counts = np.zeros((2, config.bins, height, width), np.uint8)
    if config.mode is FrameMode.rvt:
        yield from rvt_frames(recording, ends, config, counts, finish)
        return
    shift = config.downsample.bit_length() - 1
    keep = kept_pixel(config)
    upcoming: Iterator[int] | None = None
    start = end = 0
    for events in recording.chunks():
        if upcoming is None:
            upcoming = iter(ends(int(events.t[0])))
            end = next(upcoming)
            start = end - config.window_us
        i = 0
        while i < events.t.size:
            i = accumulate(counts, *events, i, start, end, config.cutoff, shift, keep)
            if i < events.t.size:  # the next event is past this window
                refuse_silence(recording, end, int(events.t[i]))
                yield end, finish(counts)
                counts[:] = 0
                start = end
                end = next(upcoming)
    if upcoming is not None:
        yield end, finish(counts)


def kept_pixel(config: FrameConfig) -> int:
    """Row and column, within its block, of the one pixel that is kept; -1: all are added.

    The pixels of RVT's `nearest-exact`: 2i + 1 at half resolution, 4i + 2 at a quarter.
    """
    return config.downsample // 2 if config.downsample_by is DownsampleBy.nearest else -1
