"""Frames by their definition, one event at a time, and recordings of events in memory."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from evspan.data_prep.recordings.base import Recording
from evspan.data_prep.recordings.events import Events
from numpy.typing import NDArray

Cell = tuple[int, int, int]  # channel, row, column


def random_events(
    rng: np.random.Generator, n: int, *, first: int, last: int, height: int, width: int
) -> Events:
    """N events with times from `first` to `last`, sorted."""
    t = np.sort(rng.integers(first, last + 1, n))
    return Events(
        t,
        rng.integers(0, width, n).astype(np.uint16),
        rng.integers(0, height, n).astype(np.uint16),
        rng.integers(0, 2, n).astype(np.uint8),
    )


class GivenRecording(Recording):
    """Events in memory, cut into chunks at the indices `cuts`."""

    format = "given"

    def __init__(
        self, events: Events, height: int, width: int, cuts: list[int] | None = None
    ) -> None:
        super().__init__(Path("given.raw"), height, width)
        self.columns = events
        self.cuts = [0, *(cuts or []), events.t.size]

    def _decoded(self) -> Iterator[Events]:
        for first, last in pairwise(self.cuts):
            yield self.columns.take(slice(first, last))


def slow_frame(
    events: Events,
    start: int,
    end: int,
    *,
    height: int,
    width: int,
    bins: int,
    cutoff: int,
    downsample: int,
    by: str,
) -> NDArray[np.uint8]:
    """The frame of the half-open window [start, end).

    Returns:
        (2 * bins, height // downsample, width // downsample).
    """
    pixels: Counter[Cell] = Counter()  # at full resolution, unbounded
    for t, x, y, p in zip(*(column.tolist() for column in events), strict=True):
        if start <= t < end:
            channel = p * bins + (t - start) * bins // (end - start)
            pixels[channel, y, x] += 1
    blocks: Counter[Cell] = Counter()
    # Of the pixels 0, 1, ... of a block the nearest to its middle; of two the later one.
    centre = downsample // 2
    for (channel, y, x), count in pixels.items():
        row = y // downsample
        column = x // downsample
        is_centre = (y, x) == (row * downsample + centre, column * downsample + centre)
        if by == "sum" or is_centre:
            blocks[channel, row, column] += count
    frame = np.zeros((2 * bins, height // downsample, width // downsample), np.uint8)
    for (channel, row, column), count in blocks.items():
        if row < frame.shape[1] and column < frame.shape[2]:
            frame[channel, row, column] = min(count, cutoff)
    return frame
