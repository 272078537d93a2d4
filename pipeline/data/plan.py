"""Which frames each lane reads when: a pure function of (seed, micro-batch).

Any number of workers and any resume therefore give the same batches.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from threading import Lock

import numpy as np
from evspan.conf.errors import ShardError
from evspan.conf.schema.training import Sampling
from numpy.typing import NDArray

ROUNDING = 1e-9  # of an expected number of repeats


@dataclass(frozen=True)
class Chunk:
    """What one lane reads for one micro-batch: `frames` frames from `first` on, zeros after them.

    Attributes:
        recording: index of the recording.
        start: the lane's state is reset to zero before it.
        streamed: the lane follows recordings.
        draw: identifies the lane's current sequence; the augmentation is drawn from it.
    """

    recording: int
    first: int
    frames: int
    start: bool
    streamed: bool
    draw: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """The recordings of one of several datasets.

    Attributes:
        label: names it; empty where it is the only one.
        weight: its part of the data, relative to the other weights; above 0.
        recordings: their indices.
    """

    label: str
    weight: float
    recordings: range


@dataclass(frozen=True)
class Repeats:
    """How often something is read, relative to a plain pass over the data; 1 or more.

    Attributes:
        recordings: (R,) of each recording, in streamed lanes.
        ends: of each recording (frames,), of the random chunk that ends at each of its frames.
    """

    recordings: NDArray[np.float64]
    ends: Sequence[NDArray[np.float64]]


def generator(seed: int, *name: int) -> np.random.Generator:
    """An independent generator for every name; counter-based, so nothing has to be replayed."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *name))))


class SamplingPlan:
    """The chunks of lanes 0 .. lanes - 1 of the whole world.

    A streaming lane walks through its own permutation of all recordings, pass after pass, chunk by
    chunk. A random lane reads, each time, a chunk that ends at a labelled frame drawn from all
    recordings, with its state from zero.

    With several parts, each part's expected fraction of the frames that a streaming lane reads, and
    of the chunks of a random lane, is its weight divided by the sum of the weights. A random lane
    draws the part first. In a streaming lane a pass has recording i `expected_repeats[i]` times on
    average: as many times as the whole number below it, and once more with the probability of the
    rest, drawn for each lane and pass. Where every recording is expected once, a pass is a
    permutation.

    Lanes that begin together stay together where recordings are equally long: every batch then has
    frames of one time since the start. A staggered lane begins anywhere in its first pass.

    Args:
        frames: number of frames of each recording.
        labelled: (frames,) bool of each recording.
        lanes: number of lanes, over all ranks.
        sequence_length: frames per chunk.
        sampling: which lanes stream.
        seed: of the run.
        parts: of the recordings, one after the other; None: they are one part.
        repeats: of recordings and chunks, within their part; None: each once.
        staggered: streaming lanes begin at a chunk that is drawn, else with a whole recording.

    Raises:
        ShardError: there is no frame at all, or none in a part.
    """

    def __init__(
        self,
        frames: Sequence[int],
        labelled: Sequence[NDArray[np.bool_]],
        *,
        lanes: int,
        sequence_length: int,
        sampling: Sampling,
        seed: int,
        parts: Sequence[Part] | None = None,
        repeats: Repeats | None = None,
        staggered: bool = False,
    ) -> None:
        parts = parts or [Part("", 1.0, range(len(frames)))]
        for part in parts:
            _require_frames(part, frames)
        self.frames = list(frames)
        self.sequence_length = sequence_length
        self.seed = seed
        streaming_lanes = {
            Sampling.stream: lanes,
            Sampling.random: 0,
            Sampling.mixed: (lanes + 1) // 2,
        }
        self.streaming_lanes = streaming_lanes[sampling]
        self.chunks = [-(-n // sequence_length) for n in frames]
        self.expected_repeats = _expected_repeats(frames, parts, repeats)
        self.passes_are_equal = bool((self.expected_repeats == 1).all())
        # Of a streaming lane; where passes differ, on average.
        self.chunks_per_epoch = max(1, round(float(self.expected_repeats @ self.chunks)))
        self.random_ends = [_RandomEnds(part, frames, labelled, repeats) for part in parts]
        weights = np.array([part.weight for part in parts])
        self._part_ends = np.cumsum(weights / weights.sum())
        self._epoch = lru_cache(maxsize=4 * lanes + 4)(self._draw_epoch)
        self._epoch_starts: dict[int, list[int]] = {}  # of each lane whose passes differ, in chunks
        self._starts_lock = Lock()
        self._skipped = [
            self._draw_skipped(lane) if staggered else 0 for lane in range(self.streaming_lanes)
        ]

    def chunk(self, lane: int, index: int) -> Chunk:
        """The chunk of `lane` in micro-batch `index` (0, 1, ... over the whole run)."""
        if lane >= self.streaming_lanes:
            return self._random_chunk(lane, index)
        epoch, offset = self._epoch_at(lane, self._skipped[lane] + index)
        order, ends = self._epoch(lane, epoch)
        position = bisect_right(ends, offset)
        recording = int(order[position])
        start_of_recording = ends[position - 1] if position else 0
        first = (offset - start_of_recording) * self.sequence_length
        return Chunk(
            recording=recording,
            first=first,
            frames=min(self.sequence_length, self.frames[recording] - first),
            start=first == 0 or index == 0,
            streamed=True,
            draw=(lane, epoch, position),
        )

    def _epoch_at(self, lane: int, index: int) -> tuple[int, int]:
        """The pass of a streaming lane in micro-batch `index`, and the chunk in it."""
        if self.passes_are_equal:
            return divmod(index, self.chunks_per_epoch)
        with self._starts_lock:
            starts = self._epoch_starts.setdefault(lane, [0])
            while starts[-1] <= index:
                _, ends = self._epoch(lane, len(starts) - 1)
                starts.append(starts[-1] + (ends[-1] if ends else 0))
            epoch = bisect_right(starts, index) - 1
            return epoch, index - starts[epoch]

    def _draw_epoch(self, lane: int, epoch: int) -> tuple[NDArray[np.int64], list[int]]:
        """The order of the recordings, and the cumulative number of chunks up to each one's end."""
        rng = generator(self.seed, 0, lane, epoch)
        if self.passes_are_equal:
            order = rng.permutation(len(self.frames))
        else:
            repeats = np.floor(self.expected_repeats + rng.random(len(self.frames)))
            order = rng.permutation(np.repeat(np.arange(len(self.frames)), repeats.astype(int)))
        return order, list(accumulate(self.chunks[i] for i in order))

    def _draw_skipped(self, lane: int) -> int:
        """The chunk of its first pass at which a staggered lane begins."""
        _, ends = self._epoch(lane, 0)
        return int(generator(self.seed, 2, lane).integers(ends[-1])) if ends else 0

    def _random_chunk(self, lane: int, index: int) -> Chunk:
        rng = generator(self.seed, 1, lane, index)
        part = 0
        if len(self.random_ends) > 1:
            part = int(np.searchsorted(self._part_ends[:-1], rng.random(), side="right"))
        recording, end = self.random_ends[part].draw(rng)
        first = max(0, end + 1 - self.sequence_length)
        return Chunk(
            recording=recording,
            first=first,
            frames=min(self.sequence_length, self.frames[recording] - first),
            start=True,
            streamed=False,
            draw=(lane, index),
        )


class _RandomEnds:
    """Draws the last frame of a random chunk from the labelled frames of a part."""

    def __init__(
        self,
        part: Part,
        frames: Sequence[int],
        labelled: Sequence[NDArray[np.bool_]],
        repeats: Repeats | None,
    ) -> None:
        ends = [np.flatnonzero(labelled[i]) for i in part.recordings]
        if not any(e.size for e in ends):  # nothing is labelled: any frame may end a chunk
            ends = [np.arange(frames[i]) for i in part.recordings]
        # (labelled frames, 2): recording and frame.
        rows = [np.stack((np.full(e.size, part.recordings[i]), e), 1) for i, e in enumerate(ends)]
        self.rows = np.concatenate(rows)
        self.cumulative: NDArray[np.float64] | None = None  # sum of the rows' repeats
        if repeats is not None:
            of_rows = [repeats.ends[i][e] for i, e in zip(part.recordings, ends, strict=True)]
            self.cumulative = np.cumsum(np.concatenate(of_rows))

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """Recording and frame."""
        if self.cumulative is None:
            row = int(rng.integers(len(self.rows)))
        else:
            value = rng.random() * self.cumulative[-1]
            row = int(np.searchsorted(self.cumulative[:-1], value, side="right"))
        recording, end = self.rows[row].tolist()
        return recording, end


def _require_frames(part: Part, frames: Sequence[int]) -> None:
    if any(frames[i] for i in part.recordings):
        return
    where = f"the split of {part.label}" if part.label else "the split"
    raise ShardError(
        f"{where} has no frames, so there is nothing to train on. Prepare recordings first: "
        "evspan prep"
    )


def _expected_repeats(
    frames: Sequence[int], parts: Sequence[Part], repeats: Repeats | None
) -> NDArray[np.float64]:
    """(R,) how often a pass of a streaming lane reads each recording, on average.

    Within a part they are as the repeats. Of all frames of a pass, which are as many as those of
    all recordings with their repeats, each part has its fraction.
    """
    expected = np.ones(len(frames))
    if repeats is not None:
        expected *= repeats.recordings
    if len(parts) == 1:
        return expected
    repeated_frames = expected * np.asarray(frames)
    total_weight = sum(part.weight for part in parts)
    for part in parts:
        rows = slice(part.recordings.start, part.recordings.stop)
        fraction = part.weight / total_weight
        expected[rows] *= fraction * repeated_frames.sum() / repeated_frames[rows].sum()
    whole = np.abs(expected - np.round(expected)) < ROUNDING
    return np.where(whole, np.round(expected), expected)
