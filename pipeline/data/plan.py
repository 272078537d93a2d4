"""Which frames each lane reads when: a pure function of (seed, micro-batch).

Any number of workers and any resume therefore give the same batches.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
from evspan.conf.errors import ShardError
from evspan.conf.schema.training import Sampling
from numpy.typing import NDArray


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


def generator(seed: int, *name: int) -> np.random.Generator:
    """An independent generator for every name; counter-based, so nothing has to be replayed."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *name))))


class SamplingPlan:
    """The chunks of lanes 0 .. lanes - 1 of the whole world.

    A streaming lane walks through its own permutation of all recordings, epoch after epoch, chunk
    by chunk. A random lane reads, each time, a chunk that ends at a labelled frame drawn from all
    recordings, with its state from zero.

    Args:
        frames: number of frames of each recording.
        labelled: (frames,) bool of each recording.
        lanes: number of lanes, over all ranks.
        sequence_length: frames per chunk.
        sampling: which lanes stream.
        seed: of the run.

    Raises:
        ShardError: there is no frame at all.
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
    ) -> None:
        if not sum(frames):
            raise ShardError(
                "the split has no frames, so there is nothing to train on. Prepare recordings "
                "first: evspan prep"
            )
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
        self.chunks_per_epoch = sum(self.chunks)
        ends = [np.flatnonzero(mask) for mask in labelled]
        if not any(e.size for e in ends):  # nothing is labelled: any frame may end a chunk
            ends = [np.arange(n) for n in frames]
        # (labelled frames, 2): recording and frame.
        self.random_ends = np.concatenate(
            [np.stack((np.full(e.size, i), e), 1) for i, e in enumerate(ends)]
        )
        self._epoch = lru_cache(maxsize=4 * lanes + 4)(self._draw_epoch)

    def chunk(self, lane: int, index: int) -> Chunk:
        """The chunk of `lane` in micro-batch `index` (0, 1, ... over the whole run)."""
        if lane >= self.streaming_lanes:
            return self._random_chunk(lane, index)
        epoch, offset = divmod(index, self.chunks_per_epoch)
        order, ends = self._epoch(lane, epoch)
        position = bisect_right(ends, offset)
        recording = int(order[position])
        start_of_recording = ends[position - 1] if position else 0
        first = (offset - start_of_recording) * self.sequence_length
        return Chunk(
            recording=recording,
            first=first,
            frames=min(self.sequence_length, self.frames[recording] - first),
            start=first == 0,
            streamed=True,
            draw=(lane, epoch, position),
        )

    def _draw_epoch(self, lane: int, epoch: int) -> tuple[NDArray[np.int64], list[int]]:
        """The order of the recordings, and the cumulative number of chunks up to each one's end."""
        order = generator(self.seed, 0, lane, epoch).permutation(len(self.frames))
        return order, list(accumulate(self.chunks[i] for i in order))

    def _random_chunk(self, lane: int, index: int) -> Chunk:
        rng = generator(self.seed, 1, lane, index)
        recording, end = self.random_ends[rng.integers(len(self.random_ends))].tolist()
        first = max(0, end + 1 - self.sequence_length)
        return Chunk(
            recording=recording,
            first=first,
            frames=min(self.sequence_length, self.frames[recording] - first),
            start=True,
            streamed=False,
            draw=(lane, index),
        )
