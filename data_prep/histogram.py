"""Events -> stacked histogram frames, streamed: (2 * bins, H, W) uint8, channel = polarity * bins + bin, oldest bin first."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

from data_prep.config import DownsampleBy, FrameConfig, FrameMode
from data_prep.errors import RecordingError
from data_prep.formats.recording import Recording
from data_prep.rvt import rvt_frames

LONGEST_SILENCE_US = 3_600_000_000  # a sensor's noise alone fires more often; a damaged timestamp must not make endless frames


@njit(cache=True, nogil=True)
def accumulate(counts, t, x, y, p, first, start, end, cutoff, shift, keep):
    """Count events from index `first` on, as long as they lie before `end`; returns the index of the next event.

    counts: (2, bins, H >> shift, W >> shift) uint8, saturating at `cutoff`. Bins tile [start, end) in integers. keep: -1 adds all
    pixels of a block up, else only those whose low `shift` bits of x and y are `keep`.
    """
    bins, height, width = counts.shape[1], counts.shape[2], counts.shape[3]
    mask, span = (1 << shift) - 1, end - start
    b, edge = 0, span  # events come in order, so a bin's end is found by comparing: a division would cost more than the rest
    i = first
    while i < t.size and t[i] < end:
        row, column = np.int64(y[i]) >> shift, np.int64(x[i]) >> shift
        wanted = keep < 0 or ((x[i] & mask) == keep and (y[i] & mask) == keep)
        if wanted and t[i] >= start and row < height and column < width:
            while (t[i] - start) * bins >= edge:
                b += 1
                edge += span
            if counts[p[i], b, row, column] < cutoff:
                counts[p[i], b, row, column] += 1
        i += 1
    return i


def frame_size(config: FrameConfig, height: int, width: int) -> tuple[int, int]:
    """(H, W) of the frames of a sensor; rows and columns that fill no whole block are left out."""
    return height // config.downsample, width // config.downsample


def whole_frame(counts: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(2, bins, H, W) -> (2 * bins, H, W), a copy."""
    return counts.reshape(-1, *counts.shape[2:]).copy()


Finished = TypeVar("Finished")


def frames_of(recording: Recording, ends: Callable[[int], Iterable[int]],
              config: FrameConfig) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(end_us, frame (2 * bins, H, W)) of every window; see `each_window`."""
    return each_window(recording, ends, config, whole_frame)


def each_window(recording: Recording, ends: Callable[[int], Iterable[int]], config: FrameConfig,
                finish: Callable[[NDArray[np.uint8]], Finished]) -> Iterator[tuple[int, Finished]]:
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
    counts = np.zeros((2, config.bins, *frame_size(config, recording.height, recording.width)), np.uint8)
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
        raise RecordingError(f"{recording.path}: no events for {(next_us - end_us) / 3.6e9:.1f} hours, up to {next_us} us. Its "
                             "timestamps are damaged, or it holds several recordings: cut it there")
