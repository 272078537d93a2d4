"""Runs a detector over whole recordings in chunks, several recordings at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from evspan.conf.schema.training import EvaluationConfig
from evspan.data_prep.labels.box_files import RAW_BOX
from evspan.pipeline.data.datasets import Dataset, RecordingData
from evspan.pipeline.evaluation.coco import Metrics, coco_metrics
from evspan.pipeline.evaluation.frames import LabelledFrames, labelled_frames, scored
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.postprocess import detections
from numpy.typing import NDArray
from torch import Tensor


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


class _Chunk(NamedTuple):
    """Frames [first, last) of a recording."""

    recording: RecordingData
    first: int
    last: int


@torch.inference_mode()
def evaluate_split(
    detector: Detector,
    data: Dataset,
    config: EvaluationConfig,
    *,
    device: torch.device,
    recordings: Sequence[RecordingData],
) -> list[RecordingResult]:
    """Detects on the labelled frames of some recordings of a dataset.

    Every frame passes through the network; the state is zero before the first of a recording.

    Returns:
        One result per recording, in their order.
    """
    lanes = min(config.batch_size, len(recordings))
    if not lanes:
        return []
    results = {recording.name: RecordingResult(recording.name) for recording in recordings}
    state = detector.initial_state(lanes, data.height, data.width, device=device)
    # The longest first, so that lanes end at about the same time.
    queue = iter(sorted(recordings, key=lambda recording: -recording.frames))
    streams = [_chunks(queue, config.sequence_length) for _ in range(lanes)]
    while True:
        chunks = [next(stream, None) for stream in streams]
        if not any(chunks):
            return list(results.values())
        frames, labelled = _read(chunks, data, config.sequence_length)
        starts = [chunk is not None and chunk.first == 0 for chunk in chunks]
        raw, state = detector(
            torch.from_numpy(frames).to(device),
            state,
            starts=torch.tensor(starts, device=device),
            labelled=torch.from_numpy(labelled),
        )
        rows_by_frame = detections(
            detector.decode(raw, data.height, data.width),
            confidence_threshold=config.confidence_threshold,
            nms_threshold=config.nms_threshold,
        )
        _add_results(results, chunks, labelled, rows_by_frame)


def _chunks(queue: Iterator[RecordingData], length: int) -> Iterator[_Chunk]:
    """The chunks of one lane. It takes its recordings from the queue that all lanes share."""
    for recording in queue:
        for first in range(0, recording.frames, length):
            yield _Chunk(recording, first, min(first + length, recording.frames))


def _read(
    chunks: Sequence[_Chunk | None], data: Dataset, length: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Frames (T, B, channels, H, W) and which are labelled (T, B); zeros where nothing is left."""
    frames = np.zeros((length, len(chunks), data.channels, data.height, data.width), np.uint8)
    labelled = np.zeros(frames.shape[:2], bool)
    for lane, chunk in enumerate(chunks):
        if chunk is not None:
            size = chunk.last - chunk.first
            frames[:size, lane] = chunk.recording.read(chunk.first, chunk.last)
            labelled[:size, lane] = chunk.recording.labelled[chunk.first : chunk.last]
    return frames, labelled


def _add_results(
    results: dict[str, RecordingResult],
    chunks: Sequence[_Chunk | None],
    labelled: NDArray[np.bool_],
    rows_by_frame: Sequence[Tensor],
) -> None:
    """Adds the detections of the labelled frames, which are in (t, lane) order."""
    for (t, lane), rows in zip(np.argwhere(labelled).tolist(), rows_by_frame, strict=True):
        chunk = chunks[lane]
        assert chunk is not None  # lanes without a chunk have no labelled frames
        frame = chunk.first + t
        result = results[chunk.recording.name]
        result.frames.append(frame)
        result.boxes.append(chunk.recording.boxes(frame))
        result.detections.append(rows.cpu().numpy())


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
