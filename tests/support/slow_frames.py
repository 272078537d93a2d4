"""Frames by their definition, one event at a time, and recordings made of given events."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from evspan.data_prep.recordings.base import Recording
from evspan.data_prep.recordings.events import Events
from numpy.typing import NDArray


def random_events(
    rng: np.random.Generator, n: int, *, first: int, last: int, height: int, width: int
) -> Events:
    t = np.sort(rng.integers(first, last + 1, n))
    return Events(
        t,
        rng.integers(0, width, n).astype(np.uint16),
        rng.integers(0, height, n).astype(np.uint16),
        rng.integers(0, 2, n).astype(np.uint8),
    )


def together(blocks) -> Events:
    return Events(*(np.concatenate(c) for c in zip(*blocks, strict=True)))


class GivenRecording(Recording):
    """Events cut into chunks at the given indices."""

    format = "given"

    def __init__(
        self, events: Events, height: int, width: int, cuts: list[int] | None = None
    ) -> None:
        super().__init__(Path("given.raw"), height, width)
        self.given, self.cuts = events, [0, *(cuts or []), events.t.size]

    def _decoded(self) -> Iterator[Events]:
        for first, last in zip(self.cuts[:-1], self.cuts[1:], strict=True):
            yield self.given.take(slice(first, last))


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
    """(2 * bins, H // downsample, W // downsample) of the half-open window [start, end)."""
    pixels: Counter[tuple[int, int, int]] = (
        Counter()
    )  # (channel, y, x) at full resolution, without end
    for t, x, y, p in zip(*(column.tolist() for column in events), strict=True):
        if start <= t < end:
            pixels[p * bins + (t - start) * bins // (end - start), y, x] += 1
    blocks: Counter[tuple[int, int, int]] = Counter()
    centre = (
        downsample // 2
    )  # of a block's pixels 0, 1, ... the nearest to its middle, the later one of two
    for (channel, y, x), count in pixels.items():
        row, column = y // downsample, x // downsample
        if by == "sum" or (y, x) == (row * downsample + centre, column * downsample + centre):
            blocks[channel, row, column] += count
    frame = np.zeros((2 * bins, height // downsample, width // downsample), np.uint8)
    for (channel, row, column), count in blocks.items():
        if row < frame.shape[1] and column < frame.shape[2]:
            frame[channel, row, column] = min(count, cutoff)
    return frame
