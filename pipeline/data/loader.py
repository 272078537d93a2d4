"""Shards -> batches of one rank's lanes and frames, read ahead by threads."""

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
from evspan.pipeline.data.plan import SamplingPlan
from torch import Tensor


class Batch(NamedTuple):
    """One micro-batch of B lanes and T frames, those of one rank; n of its frames are labelled.

    frames: (T, B, C, H, W) uint8. starts: (B,) bool. labelled: (T, B) bool. boxes: (n, most, 5) float32 class, cx, cy,
    w, h in pixels, for the labelled frames in (t, b) order, rows beyond `counts` (n,) int64 zero.
    """

    frames: Tensor
    starts: Tensor
    labelled: Tensor
    boxes: Tensor
    counts: Tensor

    def to(self, device: torch.device) -> "Batch":
        """On `device`, but for `labelled`, which the detector reads on the CPU."""
        return Batch(*(t.to(device, non_blocking=True) for t in self))._replace(
            labelled=self.labelled
        )


def pad_boxes(boxes: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """n arrays (k, 5) -> (n, most, 5) float32 and counts (n,); at least one row, so that shapes stay sane."""
    counts = [len(b) for b in boxes]
    padded = torch.zeros(len(boxes), max(counts, default=0) or 1, 5)
    for i, rows in enumerate(boxes):
        padded[i, : len(rows)] = torch.from_numpy(rows)
    return padded, torch.tensor(counts, dtype=torch.int64)


class Loader:
    """Batches of the lanes `lanes` (of the world's) and the frames `frames` (of each chunk's), without end.

    Which batch comes when is the plan's business; `config.num_workers` threads only decide how far ahead it is read. Ranks
    that share a sequence read different frames of the same chunks, all with the lane's one draw of the augmentation.
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
    ) -> None:
        self.dataset, self.plan, self.lanes, self.frames, self.config, self.seed = (
            dataset,
            plan,
            lanes,
            frames,
            config,
            seed,
        )

    def batch(self, index: int) -> Batch:
        """Micro-batch `index` of the whole run."""
        data = self.dataset
        frames = np.zeros(
            (len(self.frames), len(self.lanes), data.channels, data.height, data.width), np.uint8
        )
        columns = [self._lane(lane, index, frames[:, b]) for b, lane in enumerate(self.lanes)]
        labelled = np.stack([c[1] for c in columns], axis=1)
        boxes, counts = pad_boxes(
            [columns[b][0][t] for t, b in zip(*np.nonzero(labelled), strict=True)]
        )
        starts = torch.tensor([c[2] for c in columns])
        return Batch(torch.from_numpy(frames), starts, torch.from_numpy(labelled), boxes, counts)

    def _lane(
        self, lane: int, index: int, out: np.ndarray
    ) -> tuple[list[np.ndarray], np.ndarray, bool]:
        """Its frames into `out`, zeros; their boxes, which are labelled, and whether the state begins at zero."""
        chunk = self.plan.chunk(lane, index)
        recording = self.dataset.recordings[chunk.recording]
        height, width, length = self.dataset.height, self.dataset.width, len(self.frames)
        how = draw_augmentation(
            self.config.augmentation, chunk, seed=self.seed, height=height, width=width
        )
        first, there = (
            chunk.first + self.frames.start,
            min(length, max(0, chunk.frames - self.frames.start)),
        )
        for t in range(
            there
        ):  # after a recording's end nothing happens; a frame at a time stays in the cache
            augment_frames(recording.read(first + t, first + t + 1), how, out[t : t + 1])
        labelled = np.zeros(length, bool)
        labelled[:there] = recording.labelled[first : first + there]
        stored = recording.boxes_of(first, first + there) if there else []
        boxes = [augment_boxes(to_center(rows), how, height=height, width=width) for rows in stored]
        return boxes, labelled, chunk.start

    def batches(self, start: int) -> Generator[Batch, None, None]:
        workers = self.config.num_workers
        if not workers:
            index = start
            while True:
                yield self.batch(index)
                index += 1
        pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
        ahead: deque[Future[Batch]] = deque(
            pool.submit(self.batch, start + i) for i in range(workers + 1)
        )
        try:
            index = start + workers + 1
            while True:
                batch = ahead.popleft().result()
                ahead.append(pool.submit(self.batch, index))
                index += 1
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
