"""Which frames each lane reads when: a pure function of (seed, micro-batch), so any worker count and any resume agree."""

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
    """What one lane reads for one micro-batch: `frames` frames from `first` on, zero frames after them."""

    recording: int
    first: int
    frames: int
    start: bool  # the lane's state begins at zero here
    streamed: bool
    draw: tuple[int, ...]  # names the lane's current sequence; augmentation draws from it


def generator(seed: int, *name: int) -> np.random.Generator:
    """An independent generator for every name: counter-based, so nothing has to be replayed to get there."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *name))))


class SamplingPlan:
    """Lanes 0 .. lanes-1 of the whole world.

    A streaming lane walks through its own permutation of all recordings, epoch after epoch, chunk by chunk. A random
    lane reads, each time, a chunk that ends at a labelled frame drawn from all recordings, with its state from zero.

    Args:
        frames: frames of each recording. labelled: (frames,) bool of each.
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
                "the split has no frames, so there is nothing to train on. Prepare recordings first: evspan prep"
            )
        self.frames, self.sequence_length, self.seed = list(frames), sequence_length, seed
        self.streaming_lanes = {
            Sampling.stream: lanes,
            Sampling.random: 0,
            Sampling.mixed: (lanes + 1) // 2,
        }[sampling]
        self.chunks = [-(-n // sequence_length) for n in frames]
        self.chunks_per_epoch = sum(self.chunks)
        ends = [np.flatnonzero(mask) for mask in labelled]
        if not any(e.size for e in ends):  # nothing is labelled: any frame may end a chunk
            ends = [np.arange(n) for n in frames]
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
        place = bisect_right(ends, offset)
        recording = int(order[place])
        first = (offset - (ends[place - 1] if place else 0)) * self.sequence_length
        return Chunk(
            recording=recording,
            first=first,
            frames=min(self.sequence_length, self.frames[recording] - first),
            start=first == 0,
            streamed=True,
            draw=(lane, epoch, place),
        )

    def _draw_epoch(self, lane: int, epoch: int) -> tuple[NDArray[np.int64], list[int]]:
        order = generator(self.seed, 0, lane, epoch).permutation(len(self.frames))
        return order, list(accumulate(self.chunks[i] for i in order))

    def _random_chunk(self, lane: int, index: int) -> Chunk:
        recording, end = self.random_ends[
            generator(self.seed, 1, lane, index).integers(len(self.random_ends))
        ].tolist()
        first = max(0, end + 1 - self.sequence_length)
        return Chunk(
            recording=recording,
            first=first,
            frames=min(self.sequence_length, self.frames[recording] - first),
            start=True,
            streamed=False,
            draw=(lane, index),
        )
