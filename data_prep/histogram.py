"""Events -> stacked histogram frames, streamed: (2 * bins, H, W) uint8, channel = polarity * bins + bin, oldest bin first."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numba import njit
from numpy.typing import NDArray

from data_prep.config import DownsampleBy, FrameConfig, FrameMode, require
from data_prep.errors import RecordingError
from data_prep.events import Events
from data_prep.formats.recording import Recording

LONGEST_SILENCE_US = 3_600_000_000  # a sensor's noise alone fires more often; a damaged timestamp must not make endless frames


@njit(cache=True, nogil=True)
def accumulate(counts, t, x, y, p, first, start, end, cutoff, shift, keep):
    """Count events from index `first` on, as long as they lie before `end`; returns the index of the next event.

    counts: (2, bins, H >> shift, W >> shift) uint8, saturating at `cutoff`. Bins tile [start, end) in integers. keep: -1 adds all
    pixels of a block up, else only those whose low `shift` bits of x and y are `keep`.
    """
    bins, height, width = counts.shape[1], counts.shape[2], counts.shape[3]
    mask = (1 << shift) - 1
    i = first
    while i < t.size and t[i] < end:
        row, column = np.int64(y[i]) >> shift, np.int64(x[i]) >> shift
        wanted = keep < 0 or ((x[i] & mask) == keep and (y[i] & mask) == keep)
        if wanted and t[i] >= start and row < height and column < width:
            b = (t[i] - start) * bins // (end - start)
            if counts[p[i], b, row, column] < cutoff:
                counts[p[i], b, row, column] += 1
        i += 1
    return i


def frame_size(config: FrameConfig, height: int, width: int) -> tuple[int, int]:
    """(H, W) of the frames of a sensor; rows and columns that fill no whole block are left out."""
    return height // config.downsample, width // config.downsample


def require_available(config: FrameConfig) -> None:
    require(config.mode is FrameMode.exact, "frames.mode=rvt is not available in this version; use frames.mode=exact")


class FrameBuilder:
    """Counts the events of one window after the other."""

    def __init__(self, config: FrameConfig, height: int, width: int) -> None:
        require_available(config)
        self.config = config
        self.counts = np.zeros((2, config.bins, *frame_size(config, height, width)), np.uint8)
        self.shift = config.downsample.bit_length() - 1
        # Nearest pixel as RVT's `nearest-exact` half resolution takes it: 2i + 1; 4i + 2 of four.
        self.keep = config.downsample // 2 if config.downsample_by is DownsampleBy.nearest and config.downsample > 1 else -1

    def add(self, events: Events, first: int, start: int, end: int) -> int:
        """Count the events of [start, end) from index `first` on; returns the index of the first at or past `end`."""
        return accumulate(self.counts, *events, first, start, end, self.config.cutoff, self.shift, self.keep)

    def take(self) -> NDArray[np.uint8]:
        """The finished frame (2 * bins, H, W), a copy; counting begins anew."""
        frame = self.counts.reshape(-1, *self.counts.shape[2:]).copy()
        self.counts[:] = 0
        return frame


def frames_of(recording: Recording, ends: Callable[[int], Iterable[int]],
              config: FrameConfig) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(end_us, frame) of every window until the last event is in; one pass over the recording, one frame in memory.

    Args:
        ends: given the first event's time, the ends of the windows, increasing and without end. A window is
            [end before, end); the first is `config.window_us` long.
    Raises:
        RecordingError: an hour or more without events.
    """
    builder, began = FrameBuilder(config, recording.height, recording.width), False
    upcoming: Iterator[int] = iter(())
    start = end = 0
    for events in recording.chunks():
        if not began:
            upcoming, began = iter(ends(int(events.t[0]))), True
            end = next(upcoming)
            start = end - config.window_us
        i = 0
        while i < events.t.size:
            i = builder.add(events, i, start, end)
            if i < events.t.size:  # the next event is past this window
                _refuse_silence(recording, end, int(events.t[i]))
                yield end, builder.take()
                start, end = end, next(upcoming)
    if began:
        yield end, builder.take()


def _refuse_silence(recording: Recording, end_us: int, next_us: int) -> None:
    if next_us - end_us >= LONGEST_SILENCE_US:
        raise RecordingError(f"{recording.path}: no events for {(next_us - end_us) / 3.6e9:.1f} hours, up to {next_us} us. Its "
                             "timestamps are damaged, or it holds several recordings: cut it there")
