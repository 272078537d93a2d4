"""Runs a detector over whole recordings in chunks, several recordings at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from evspan.conf.progress import ProgressBar
from evspan.conf.schema.training import EvaluationConfig
from evspan.data_prep.labels.box_files import RAW_BOX
from evspan.pipeline.data.augment import Augmentation
from evspan.pipeline.data.batch import Batch, BatchLabels, pad_rows
from evspan.pipeline.data.datasets import Dataset, RecordingData
from evspan.pipeline.data.device_batches import device_batches, encodes_for
from evspan.pipeline.data.encoded import EncodedBatch, encode_batch
from evspan.pipeline.data.loader import ReadingStoppedError, read_ahead
from evspan.pipeline.evaluation.coco import Metrics, coco_metrics
from evspan.pipeline.evaluation.frames import LabelledFrames, labelled_frames, scored
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.postprocess import DetectionLimits, PendingDetections
from numpy.typing import NDArray

READ_THREADS = 2  # of encoded frames, for a GPU
CPU_READ_THREADS = 1


@dataclass
class RecordingResult:
    """The labelled frames of a recording.

    frames: their indices. boxes: of each, (n,) shards.BOX. detections: of each, (k, 7) float32 x1,
    y1, x2, y2 (pixels of the stored frames), objectness, class score, class id.
    """

    name: str
    frames: list[int] = field(default_factory=list)
    boxes: list[NDArray[np.void]] = field(default_factory=list)
    detections: list[NDArray[np.float32]] = field(default_factory=list)

    def as_raw_boxes(self, data: Dataset) -> NDArray[np.void]:
        """The detections in Prophesee's format.

        Returns:
            (K,) RAW_BOX, in pixels of the sensor and times of the recording's clock.
        """
        recording = next(r for r in data.recordings if r.name == self.name)
        times_us = [int(recording.end_us[f]) + recording.clock_us for f in self.frames]
        return raw_boxes(times_us, self.detections, data.frames.downsample)


def raw_boxes(
    times_us: Sequence[int], rows_by_frame: Sequence[NDArray[np.float32]], scale: int
) -> NDArray[np.void]:
    """Detections as RAW_BOX.

    Args:
        times_us: end of each frame's window, ascending.
        rows_by_frame: (k, 7) x1, y1, x2, y2, objectness, class score, class id.
        scale: pixels of the sensor per pixel of a frame.

    Returns:
        (K,) RAW_BOX in pixels of the sensor, sorted by time.
    """
    counts = [len(rows) for rows in rows_by_frame]
    rows = np.concatenate(rows_by_frame) if counts else np.zeros((0, 7), np.float32)
    boxes = np.zeros(len(rows), RAW_BOX)
    boxes["t"] = np.repeat(np.asarray(times_us, np.int64), counts)
    boxes["x"] = scale * rows[:, 0]
    boxes["y"] = scale * rows[:, 1]
    boxes["w"] = scale * (rows[:, 2] - rows[:, 0])
    boxes["h"] = scale * (rows[:, 3] - rows[:, 1])
    boxes["class_id"] = rows[:, 6]
    boxes["class_confidence"] = rows[:, 4] * rows[:, 5]
    return boxes


def of_named_classes(rows: NDArray[np.float32], classes: Sequence[str]) -> NDArray[np.float32]:
    """The detections of classes that have a name; a head may have more classes.

    Args:
        rows: (k, 7), the last column is the class id.
        classes: names of class 0, 1, ...
    """
    return rows[rows[:, 6] < len(classes)]


class _Chunk(NamedTuple):
    """Frames [first, last) of a recording."""

    recording: RecordingData
    first: int
    last: int


# Per lane a chunk; None: its recordings have ended.
_Chunks = Sequence[_Chunk | None]


@torch.inference_mode()
def evaluate_split(
    detector: Detector,
    data: Dataset,
    config: EvaluationConfig,
    *,
    device: torch.device,
    recordings: Sequence[RecordingData],
    stop_requested: Callable[[], bool] | None = None,
    between_chunks: Callable[[], None] = lambda: None,
) -> list[RecordingResult]:
    """Detects on the labelled frames of some recordings of a dataset, objects of its classes.

    Every frame passes through the network; the state is zero before the first of a recording.
    Threads read the next chunks meanwhile. The host waits once per chunk, for the detections of
    the chunk before.

    Args:
        stop_requested: called between chunks, and while the next one is read.
        between_chunks: called before each chunk.

    Returns:
        One result per recording, in their order.

    Raises:
        ReadingStoppedError: `stop_requested` returned true.
    """
    lanes = min(config.batch_size, len(recordings))
    if not lanes:
        return []
    results = {recording.name: RecordingResult(recording.name) for recording in recordings}
    limits = DetectionLimits(config.confidence_threshold, config.nms_threshold)
    state = detector.initial_state(lanes, data.height, data.width, device=device)
    steps = _steps(recordings, lanes, config.sequence_length)
    reader = _Reader(data, config.sequence_length, encoded=encodes_for(device))
    threads = READ_THREADS if device.type != "cpu" else CPU_READ_THREADS
    batches = device_batches(read_ahead(reader, steps, threads, stop_requested), device)
    before: tuple[_Chunks, PendingDetections] | None = None
    with closing(batches), ProgressBar("evaluating", len(steps)) as bar:
        for chunks, batch in zip(steps, batches, strict=True):
            if stop_requested is not None and stop_requested():
                raise ReadingStoppedError
            between_chunks()
            raw, state = detector(batch.frames, state, starts=batch.starts, labelled=batch.labelled)
            decoded = detector.decode(raw, data.height, data.width)
            current = (chunks, PendingDetections(decoded, limits))
            if before is not None:
                _add_results(results, *before, data.classes)
            before = current
            bar.advance()
    if before is not None:
        _add_results(results, *before, data.classes)
    return list(results.values())


def _steps(recordings: Sequence[RecordingData], lanes: int, length: int) -> list[_Chunks]:
    """The chunks of `length` frames that pass through the network together."""
    # The longest first, so that lanes end at about the same time.
    queue = iter(sorted(recordings, key=lambda recording: -recording.frames))
    streams = [_lane_chunks(queue, length) for _ in range(lanes)]
    steps: list[_Chunks] = []
    while True:
        chunks = [next(stream, None) for stream in streams]
        if not any(chunks):
            return steps
        steps.append(chunks)


def _lane_chunks(queue: Iterator[RecordingData], length: int) -> Iterator[_Chunk]:
    """The chunks of one lane. It takes its recordings from the queue that all lanes share."""
    for recording in queue:
        for first in range(0, recording.frames, length):
            yield _Chunk(recording, first, min(first + length, recording.frames))


class _Reader:
    """Reads the frames of chunks; zeros where nothing is left of a recording.

    Args:
        length: frames of a chunk.
        encoded: as they are stored, for another device than the CPU, in page-locked memory where
            there is a GPU.
    """

    def __init__(self, data: Dataset, length: int, *, encoded: bool) -> None:
        self.data = data
        self.length = length
        self.encoded = encoded

    def __call__(self, chunks: _Chunks) -> Batch | EncodedBatch:
        """The batch of a step, without boxes."""
        data = self.data
        shape = (self.length, len(chunks), data.channels, data.height, data.width)
        labels = _labels(chunks, self.length)
        if self.encoded:
            runs = [c and c.recording.codes(c.first, c.last) for c in chunks]
            still = [Augmentation()] * len(chunks)
            return encode_batch(runs, still, shape, labels, pinned=torch.cuda.is_available())
        frames = np.zeros(shape, np.uint8)
        for lane, chunk in enumerate(chunks):
            if chunk is not None:
                size = chunk.last - chunk.first
                frames[:size, lane] = chunk.recording.read(chunk.first, chunk.last)
        return Batch(torch.from_numpy(frames), *labels)


def _labels(chunks: _Chunks, length: int) -> BatchLabels:
    """Which lanes start, and which frames are labelled. Without boxes: the detector reads none."""
    is_labelled = torch.zeros(length, len(chunks), dtype=torch.bool)
    for lane, chunk in enumerate(chunks):
        if chunk is not None:
            rows = chunk.recording.labelled[chunk.first : chunk.last]
            is_labelled[: len(rows), lane] = torch.from_numpy(rows)
    padded = pad_rows([])
    return BatchLabels(
        starts=torch.tensor([chunk is not None and chunk.first == 0 for chunk in chunks]),
        labelled=is_labelled,
        following=is_labelled.new_ones(0, len(chunks)),
        boxes=padded.boxes,
        counts=padded.counts,
        regions=padded.regions,
    )


def _add_results(
    results: dict[str, RecordingResult],
    chunks: _Chunks,
    pending: PendingDetections,
    classes: Sequence[str],
) -> None:
    """Adds the detections of the labelled frames, which are in (t, lane) order."""
    rows = iter(pending.read())
    boxes = [chunk and chunk.recording.boxes_of(chunk.first, chunk.last) for chunk in chunks]
    for t in range(max(c.last - c.first for c in chunks if c)):
        for chunk, boxes_of_chunk in zip(chunks, boxes, strict=True):
            if chunk is None or boxes_of_chunk is None or chunk.first + t >= chunk.last:
                continue
            frame = chunk.first + t
            if chunk.recording.labelled[frame]:
                result = results[chunk.recording.name]
                result.frames.append(frame)
                result.boxes.append(boxes_of_chunk[t])
                result.detections.append(of_named_classes(next(rows).numpy(), classes))


def labelled(results: Sequence[RecordingResult], data: Dataset) -> LabelledFrames:
    """All labelled frames of these recordings, before the protocol's filters."""
    end_us = {recording.name: recording.end_us for recording in data.recordings}
    return labelled_frames(
        [result.name for result in results],
        [end_us[result.name][result.frames] for result in results],
        [result.boxes for result in results],
        [result.detections for result in results],
    )


def score(results: Sequence[RecordingResult], data: Dataset, config: EvaluationConfig) -> Metrics:
    """COCO metrics of all recordings together."""
    frames, *_ = scored(labelled(results, data), config)
    return coco_metrics(frames, data.classes)
