"""Batches of one rank's lanes and frames from shards, read ahead by threads."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import count
from typing import Literal, NamedTuple, TypeVar, overload

import numpy as np
import torch
from evspan.conf.schema.training import TrainingConfig
from evspan.pipeline.data.augment import (
    Augmentation,
    augment_box_rows,
    augment_frames,
    decode_augmented,
    draw_augmentation,
)
from evspan.pipeline.data.batch import Batch, BatchLabels, pad_rows
from evspan.pipeline.data.boxes import to_center
from evspan.pipeline.data.datasets import Dataset, RecordingData
from evspan.pipeline.data.encoded import EncodedBatch, encode_batch
from evspan.pipeline.data.expand import Shape
from evspan.pipeline.data.plan import Chunk, SamplingPlan
from numpy.typing import NDArray

CPU_WORKERS = 2
POLL_S = 0.5  # between two looks for a request to stop, while a batch is awaited
MOST_WORKERS = 8  # by default; each holds a batch in memory

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Lane(NamedTuple):
    """What a lane contributes to a micro-batch, but its frames.

    recording: whose frames `first`, ..., first + existing - 1 are the lane's first ones; after them
        it has none.
    boxes: per frame (k, 5) class, cx, cy, w, h in pixels; of class -1: ignore regions.
    labelled: (T,) bool. following: (looks_back,) bool.
    start: the lane's state is reset to zero.
    """

    recording: RecordingData
    first: int
    existing: int
    augmentation: Augmentation
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
        """Micro-batch `index` of the whole run, on the CPU."""
        lanes = [self._lane(lane, index) for lane in self.lanes]
        frames = np.zeros(self._shape, np.uint8)
        for b, lane in enumerate(lanes):
            if lane.existing:
                _read_frames(lane, frames[: lane.existing, b])
        return Batch(torch.from_numpy(frames), *_labels(lanes))

    def encoded_batch(self, index: int) -> EncodedBatch:
        """Micro-batch `index` of the whole run, for another device.

        In page-locked memory where there is a GPU.
        """
        lanes = [self._lane(lane, index) for lane in self.lanes]
        runs = [
            lane.recording.codes(lane.first, lane.first + lane.existing) if lane.existing else None
            for lane in lanes
        ]
        return encode_batch(
            runs,
            [lane.augmentation for lane in lanes],
            self._shape,
            _labels(lanes),
            pinned=torch.cuda.is_available(),
            first_frames=[lane.first for lane in lanes],
        )

    def batch_without_data(self, index: int) -> Batch:
        """Micro-batch `index` without events and boxes, on the CPU. It reads no file."""
        lanes = [self._lane(lane, index, read_boxes=False) for lane in self.lanes]
        return Batch(torch.zeros(self._shape, dtype=torch.uint8), *_labels(lanes))

    @property
    def _shape(self) -> Shape:
        data = self.dataset
        return len(self.frames), len(self.lanes), data.channels, data.height, data.width

    def _lane(self, lane: int, index: int, *, read_boxes: bool = True) -> _Lane:
        chunk = self.plan.chunk(lane, index)
        recording = self.dataset.recordings[chunk.recording]
        height = self.dataset.height
        width = self.dataset.width
        augmentation = self._augmentation(chunk)
        length = len(self.frames)
        first = chunk.first + self.frames.start
        # After a recording's end the frames stay zero.
        existing = min(length, max(0, chunk.frames - self.frames.start))
        labelled = np.zeros(length, bool)
        labelled[:existing] = recording.labelled[first : first + existing]
        boxes: list[NDArray[np.float32]] = [np.zeros((0, 5), np.float32)] * existing
        if existing and read_boxes:
            rows, counts = recording.box_rows(first, first + existing)
            boxes = augment_box_rows(
                to_center(rows),
                counts,
                augmentation,
                height=height,
                width=width,
                min_visible=self.config.augmentation.min_visible,
            )
        return _Lane(
            recording=recording,
            first=first,
            existing=existing,
            augmentation=augmentation,
            boxes=boxes,
            labelled=labelled,
            following=self._following(chunk),
            start=chunk.start,
        )

    def augmentations(self, index: int) -> list[Augmentation]:
        """What is drawn for each lane of micro-batch `index`."""
        return [self._augmentation(self.plan.chunk(lane, index)) for lane in self.lanes]

    def _augmentation(self, chunk: Chunk) -> Augmentation:
        return draw_augmentation(
            self.config.augmentation,
            chunk,
            seed=self.seed,
            height=self.dataset.height,
            width=self.dataset.width,
            frame_us=self.dataset.frames.window_us,
        )

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

    @overload
    def batches(
        self,
        start: int,
        *,
        encoded: Literal[False] = ...,
        stop_requested: Callable[[], bool] | None = ...,
    ) -> Generator[Batch, None, None]: ...

    @overload
    def batches(
        self, start: int, *, encoded: bool, stop_requested: Callable[[], bool] | None = ...
    ) -> Generator[Batch | EncodedBatch, None, None]: ...

    def batches(
        self,
        start: int,
        *,
        encoded: bool = False,
        stop_requested: Callable[[], bool] | None = None,
    ) -> Generator[Batch | EncodedBatch, None, None]:
        """Micro-batches from index `start` on, read ahead by `config.num_workers` threads.

        Args:
            encoded: for another device than the CPU (`device_batches`).
            stop_requested: as of `read_ahead`.
        """
        read = self.encoded_batch if encoded else self.batch
        workers = self.workers(encoded=encoded)
        return read_ahead(read, count(start), workers, stop_requested)

    def workers(self, *, encoded: bool) -> int:
        """Threads of `batches`."""
        if self.config.num_workers >= 0:
            return self.config.num_workers
        return default_workers(torch.get_num_threads(), gpu=encoded)


def _read_frames(lane: _Lane, out: NDArray[np.uint8]) -> None:
    """Writes the lane's frames, augmented, into `out` (existing, C, H, W), zeros."""
    if lane.recording.read_codes is not None:
        codes = lane.recording.codes(lane.first, lane.first + lane.existing)
        decode_augmented(codes, lane.augmentation, out, lane.first)
        return
    for t in range(lane.existing):  # a frame at a time stays in the cache
        frame = lane.recording.read(lane.first + t, lane.first + t + 1)
        augment_frames(frame, lane.augmentation, out[t : t + 1], lane.first + t)


def _labels(lanes: Sequence[_Lane]) -> BatchLabels:
    labelled = np.stack([lane.labelled for lane in lanes], axis=1)
    following = np.stack([lane.following for lane in lanes], axis=1)
    boxes = [lanes[b].boxes[t] for t, b in zip(*np.nonzero(labelled), strict=True)]
    padded = pad_rows(boxes)
    return BatchLabels(
        starts=torch.tensor([lane.start for lane in lanes]),
        labelled=torch.from_numpy(labelled),
        following=torch.from_numpy(following),
        boxes=padded.boxes,
        counts=padded.counts,
        regions=padded.regions,
    )


def default_workers(cores: int, *, gpu: bool) -> int:
    """Threads that read ahead for a rank which has this number of cores.

    With a GPU one core is left to the thread that trains. On a CPU the training uses all cores, and
    a step takes so long that two threads read ahead far enough.
    """
    if not gpu:
        return CPU_WORKERS
    return max(1, min(MOST_WORKERS, cores - 1))


class ReadingStoppedError(Exception):
    """This rank was asked to stop; what was to be read next is left out."""


def read_ahead(
    read: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    stop_requested: Callable[[], bool] | None = None,
) -> Generator[Result, None, None]:
    """The results of `read` for all items, in their order.

    Args:
        workers: threads that read ahead, up to workers + 1 results; 0: the caller's thread reads.
        stop_requested: called while the next result is awaited, with `workers` only.

    Raises:
        ReadingStoppedError: `stop_requested` returned true.
    """
    if not workers:
        for item in items:
            yield read(item)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
    ahead: deque[Future[Result]] = deque()
    try:
        for item in items:
            ahead.append(pool.submit(read, item))
            if len(ahead) > workers + 1:
                yield _result(ahead.popleft(), stop_requested)
        while ahead:
            yield _result(ahead.popleft(), stop_requested)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _result(future: Future[Result], stop_requested: Callable[[], bool] | None) -> Result:
    """Waits for the result, but not after a request to stop."""
    while stop_requested is not None and not future.done():
        wait([future], timeout=POLL_S)
        if not future.done() and stop_requested():
            raise ReadingStoppedError
    return future.result()
