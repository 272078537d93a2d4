"""Events -> stacked histogram frames, streamed: (2 * bins, H, W) uint8, channel = polarity * bins + bin, oldest bin first."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from evspan.conf.errors import RecordingError
from evspan.conf.schema.prep import DownsampleBy, FrameConfig, FrameMode
from evspan.data_prep.frames.rvt import rvt_frames
from evspan.data_prep.recordings.base import Recording
from numba import njit
from numpy.typing import NDArray

LONGEST_SILENCE_US = 3_600_000_000  # a sensor's noise alone fires more often; a damaged timestamp must not make endless frames


@njit(cache=True, nogil=True)
def accumulate(counts, t, x, y, p, first, start, end, cutoff, shift, keep):
    """Count events from index `first` on, as long as they lie before `end`; returns the index of the next event.

    counts: (2, bins, H >> shift, W >> shift) uint8, saturating at `cutoff`. Bins tile [start, end) in integers. keep: -1 adds all
    pixels of a block up, else only those whose low `shift` bits of x and y are `keep`. t: sorted.
    """
    # No division and no foreseeable branch per event: a bin's events lie between two indices, and what is not kept adds 0.
    # Unsigned throughout: numba tests signed indices for being negative.
    bins, height, width = (
        np.uint64(counts.shape[1]),
        np.uint64(counts.shape[2]),
        np.uint64(counts.shape[3]),
    )
    flat, shift, mask = counts.reshape(-1), np.uint64(shift), np.uint64((1 << shift) - 1)
    all_, kept, top, span = keep < 0, np.uint64(max(keep, 0)), np.uint8(cutoff), end - start
    i = first + np.searchsorted(t[first:], start)
    for b in range(counts.shape[1]):
        stop = i + np.searchsorted(
            t[i:], start + ((b + 1) * span + counts.shape[1] - 1) // counts.shape[1]
        )
        for j in range(i, stop):
            row, column = np.uint64(y[j]) >> shift, np.uint64(x[j]) >> shift
            if row < height and column < width:
                cell = ((np.uint64(p[j]) * bins + np.uint64(b)) * height + row) * width + column
                wanted = all_ | (((x[j] & mask) == kept) & ((y[j] & mask) == kept))
                flat[cell] += np.uint8(wanted & (flat[cell] < top))
        i = stop
    return i


def frame_size(config: FrameConfig, height: int, width: int) -> tuple[int, int]:
    """(H, W) of the frames of a sensor; rows and columns that fill no whole block are left out."""
    return height // config.downsample, width // config.downsample


def whole_frame(counts: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(2, bins, H, W) -> (2 * bins, H, W), a copy."""
    return counts.reshape(-1, *counts.shape[2:]).copy()


Finished = TypeVar("Finished")


def frames_of(
    recording: Recording, ends: Callable[[int], Iterable[int]], config: FrameConfig
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(end_us, frame (2 * bins, H, W)) of every window; see `each_window`."""
    return each_window(recording, ends, config, whole_frame)


def each_window(
    recording: Recording,
    ends: Callable[[int], Iterable[int]],
    config: FrameConfig,
    finish: Callable[[NDArray[np.uint8]], Finished],
) -> Iterator[tuple[int, Finished]]:
    """(end_us, what `finish` makes) of every window until the last event is in; one pass over the recording, one frame in
    memory.

    Args:
        ends: given the first event's time, the ends of the windows, increasing and without end. A window is
            [end before, end), and the first is `config.window_us` long; in mode rvt each is [end - window, end], and they
            may come to an end.
        finish: makes what is yielded of the counts (2, bins, H, W) of a window, which are zeroed after it.
    Raises:
        RecordingError: an hour or more without events.
    """
    counts = np.zeros(
        (2, config.bins, *frame_size(config, recording.height, recording.width)), np.uint8
    )
    if config.mode is FrameMode.rvt:
        yield from rvt_frames(recording, ends, config, counts, finish)
        return
    shift, keep = config.downsample.bit_length() - 1, kept_pixel(config)
    upcoming: Iterator[int] = iter(())
    start = end = 0
    began = False
    for events in recording.chunks():
        if not began:
            upcoming, began = iter(ends(int(events.t[0]))), True
            end = next(upcoming)
            start = end - config.window_us
        i = 0
        while i < events.t.size:
            i = accumulate(counts, *events, i, start, end, config.cutoff, shift, keep)
            if i < events.t.size:  # the next event is past this window
                _refuse_silence(recording, end, int(events.t[i]))
                yield end, finish(counts)
                counts[:] = 0
                start, end = end, next(upcoming)
    if began:
        yield end, finish(counts)


def kept_pixel(config: FrameConfig) -> int:
    """Row and column, within its block, of the one pixel that is kept; -1: all are added up.

    As RVT's `nearest-exact` half resolution has it: 2i + 1; 4i + 2 of four.
    """
    return config.downsample // 2 if config.downsample_by is DownsampleBy.nearest else -1


def _refuse_silence(recording: Recording, end_us: int, next_us: int) -> None:
    if next_us - end_us >= LONGEST_SILENCE_US:
        raise RecordingError(
            f"{recording.path}: no events for {(next_us - end_us) / 3.6e9:.1f} hours, up to {next_us} us. Its "
            "timestamps are damaged, or it holds several recordings: cut it there"
        )
