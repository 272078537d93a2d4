"""Batches of one rank's lanes and frames from shards, read ahead by threads."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from evspan.conf.schema.training import TrainingConfig
from evspan.pipeline.data.augment import augment_boxes, augment_frames, draw_augmentation
from evspan.pipeline.data.boxes import to_center
from evspan.pipeline.data.datasets import Dataset
from evspan.pipeline.data.plan import Chunk, SamplingPlan
from numpy.typing import NDArray
from torch import Tensor


class Batch(NamedTuple):
    """One micro-batch of one rank: B lanes, T frames, of which n are labelled.

    frames: (T, B, C, H, W) uint8.
    starts: (B,) bool, lanes whose state is reset to zero before the first frame.
    labelled: (T, B) bool.
    following: (looks_back, B) bool, which of the frames after the last one are labelled; True for
        frames of the next chunk, which may be labelled.
    boxes: (n, G, 5) float32 class, cx, cy, w, h in pixels, of the labelled frames in (t, b) order.
    counts: (n,) int64 number of boxes of each labelled frame; rows of `boxes` after them are zero.
    """

    frames: Tensor
    starts: Tensor
    labelled: Tensor
    following: Tensor
    boxes: Tensor
    counts: Tensor

    def to(self, device: torch.device) -> "Batch":
        """A copy on `device`, except what the detector reads on the CPU: which are labelled."""
        moved = Batch(*(t.to(device, non_blocking=True) for t in self))
        return moved._replace(labelled=self.labelled, following=self.following)


def pad_boxes(boxes: list[NDArray[np.float32]]) -> tuple[Tensor, Tensor]:
    """Pads boxes to one length, at least one row.

    Args:
        boxes: n arrays (k, 5).

    Returns:
        (n, G, 5) float32 and the numbers of valid rows (n,) int64.
    """
    counts = [len(b) for b in boxes]
    padded = torch.zeros(len(boxes), max(counts, default=0) or 1, 5)
    for i, rows in enumerate(boxes):
        padded[i, : len(rows)] = torch.from_numpy(rows)
    return padded, torch.tensor(counts, dtype=torch.int64)


class _LaneLabels(NamedTuple):
    """Of one lane. boxes: per frame (k, 5) class, cx, cy, w, h in pixels. labelled: (T,) bool.

    following: (looks_back,) bool. start: the lane's state is reset to zero.
    """

    boxes: list[NDArray[np.float32]]
    labelled: NDArray[np.bool_]
    following: NDArray[np.bool_]
    start: bool


class Loader:
    """Batches without end.

    The plan determines the batches; `config.num_workers` only determines how far ahead they are
    read. Ranks that share a sequence read different frames of the same chunks, with the lane's one
    augmentation.

    Args:
        lanes: this rank's, of the world's lanes.
        frames: this rank's, of each chunk's frames.
        config: augmentation and num_workers.
        seed: of the run.
        looks_back: number of earlier frames that the model's temporal attention reads.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: SamplingPlan,
        lanes: range,
        frames: range,
        config: TrainingConfig,
        *,
        seed: int,
        looks_back: int = 0,
    ) -> None:
        self.dataset = dataset
        self.plan = plan
        self.lanes = lanes
        self.frames = frames
        self.config = config
        self.seed = seed
        self.looks_back = looks_back

    def batch(self, index: int) -> Batch:
        """Micro-batch `index` of the whole run."""
        data = self.dataset
        shape = (len(self.frames), len(self.lanes), data.channels, data.height, data.width)
        frames = np.zeros(shape, np.uint8)
        lanes = [self._lane(lane, index, frames[:, b]) for b, lane in enumerate(self.lanes)]
        labelled = np.stack([lane.labelled for lane in lanes], axis=1)
        following = np.stack([lane.following for lane in lanes], axis=1)
        boxes = [lanes[b].boxes[t] for t, b in zip(*np.nonzero(labelled), strict=True)]
        padded, counts = pad_boxes(boxes)
        return Batch(
            frames=torch.from_numpy(frames),
            starts=torch.tensor([lane.start for lane in lanes]),
            labelled=torch.from_numpy(labelled),
            following=torch.from_numpy(following),
            boxes=padded,
            counts=counts,
        )

    def _lane(self, lane: int, index: int, out: NDArray[np.uint8]) -> _LaneLabels:
        """Writes the lane's frames into `out` (T, C, H, W), zeros."""
        chunk = self.plan.chunk(lane, index)
        recording = self.dataset.recordings[chunk.recording]
        height = self.dataset.height
        width = self.dataset.width
        augmentation = draw_augmentation(
            self.config.augmentation, chunk, seed=self.seed, height=height, width=width
        )
        length = len(self.frames)
        first = chunk.first + self.frames.start
        # After a recording's end the frames stay zero.
        existing = min(length, max(0, chunk.frames - self.frames.start))
        for t in range(existing):  # a frame at a time stays in the cache
            frame = recording.read(first + t, first + t + 1)
            augment_frames(frame, augmentation, out[t : t + 1])
        labelled = np.zeros(length, bool)
        labelled[:existing] = recording.labelled[first : first + existing]
        stored = recording.boxes_of(first, first + existing) if existing else []
        boxes = [
            augment_boxes(to_center(rows), augmentation, height=height, width=width)
            for rows in stored
        ]
        return _LaneLabels(boxes, labelled, self._following(chunk), chunk.start)

    def _following(self, chunk: Chunk) -> NDArray[np.bool_]:
        """Which of the `looks_back` frames after this rank's last one are labelled.

        Known without the other ranks: every rank opens the whole dataset.
        """
        following = np.ones(self.looks_back, bool)
        of_chunk = following[: self.plan.sequence_length - self.frames.stop]
        labelled = self.dataset.recordings[chunk.recording].labelled
        existing = labelled[chunk.first + self.frames.stop : chunk.first + chunk.frames]
        existing = existing[: len(of_chunk)]
        of_chunk[: len(existing)] = existing
        of_chunk[len(existing) :] = False  # after the recording's end
        return following

    def batches(self, start: int) -> Generator[Batch, None, None]:
        """Micro-batches from index `start` on, read ahead by `config.num_workers` threads."""
        workers = self.config.num_workers
        if not workers:
            index = start
            while True:
                yield self.batch(index)
                index += 1
        pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
        ahead: deque[Future[Batch]] = deque()
        for i in range(workers + 1):
            ahead.append(pool.submit(self.batch, start + i))
        try:
            index = start + workers + 1
            while True:
                batch = ahead.popleft().result()
                ahead.append(pool.submit(self.batch, index))
                index += 1
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
