"""The detector over whole recordings, state carried from chunk to chunk, several recordings side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

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


@dataclass
class RecordingResult:
    """A recording's labelled frames: number, boxes (shards.BOX) and detections (k, 7) x1, y1, x2, y2, objectness, class score,
    class id, in pixels of the stored frames."""

    name: str
    frames: list[int] = field(default_factory=list)
    boxes: list[NDArray] = field(default_factory=list)
    detections: list[NDArray[np.float32]] = field(default_factory=list)

    def as_raw_boxes(self, data: Dataset) -> NDArray:
        """Prophesee's form, RAW_BOX: pixels of the sensor, times in the recording's own clock."""
        recording, scale = (
            next(r for r in data.recordings if r.name == self.name),
            data.frames.downsample,
        )
        times = [int(recording.end_us[f]) + recording.clock_us for f in self.frames]
        return raw_boxes(times, self.detections, scale)


def raw_boxes(times_us: Sequence[int], found: Sequence[NDArray], scale: int) -> NDArray:
    """Detections (k, 7) of frames that end at `times_us`, in pixels 1/scale of the sensor's -> RAW_BOX, sorted by time."""
    out = np.zeros(sum(map(len, found)), RAW_BOX)
    rows = np.concatenate(found) if len(found) else np.zeros((0, 7), np.float32)
    out["t"] = np.repeat(np.asarray(times_us, np.int64), [len(f) for f in found])
    out["x"], out["y"] = scale * rows[:, 0], scale * rows[:, 1]
    out["w"], out["h"] = scale * (rows[:, 2] - rows[:, 0]), scale * (rows[:, 3] - rows[:, 1])
    out["class_id"], out["class_confidence"] = rows[:, 6], rows[:, 4] * rows[:, 5]
    return out


@torch.inference_mode()
def evaluate_split(
    detector: Detector,
    data: Dataset,
    config: EvaluationConfig,
    *,
    device: torch.device,
    recordings: Sequence[RecordingData],
) -> list[RecordingResult]:
    """Detections of the labelled frames of these recordings; one result each, in the order given."""
    lanes = min(config.batch_size, len(recordings))
    if not lanes:
        return []
    results = {r.name: RecordingResult(r.name) for r in recordings}
    state = detector.initial_state(lanes, data.height, data.width, device=device)
    queue = iter(
        sorted(recordings, key=lambda r: -r.frames)
    )  # the longest first: lanes run dry at about the same time
    streams = [_chunks(queue, config.sequence_length) for _ in range(lanes)]
    while any(chunks := [next(s, None) for s in streams]):
        frames = np.zeros(
            (config.sequence_length, lanes, data.channels, data.height, data.width), np.uint8
        )
        labelled = np.zeros(frames.shape[:2], bool)
        for lane, chunk in enumerate(chunks):
            if chunk is not None:
                recording, first, last = chunk
                frames[: last - first, lane] = recording.read(first, last)
                labelled[: last - first, lane] = recording.labelled[first:last]
        starts = torch.tensor([c is not None and c[1] == 0 for c in chunks], device=device)
        raw, state = detector(
            torch.from_numpy(frames).to(device),
            state,
            starts=starts,
            labelled=torch.from_numpy(labelled),
        )
        found = detections(
            detector.decode(raw, data.height, data.width),
            confidence_threshold=config.confidence_threshold,
            nms_threshold=config.nms_threshold,
        )
        for (t, lane), rows in zip(np.argwhere(labelled).tolist(), found, strict=True):
            recording, first, _ = chunks[lane]  # type: ignore[misc]  # labelled only where there is a chunk
            result = results[recording.name]
            result.frames.append(first + t)
            result.boxes.append(recording.boxes(first + t))
            result.detections.append(rows.cpu().numpy())
    return list(results.values())


def _chunks(
    queue: Iterator[RecordingData], length: int
) -> Iterator[tuple[RecordingData, int, int]]:
    """(recording, first, last) of one lane: it takes the next recording from the queue that all lanes share."""
    for recording in queue:
        for first in range(0, recording.frames, length):
            yield recording, first, min(first + length, recording.frames)


def labelled(results: Sequence[RecordingResult], data: Dataset) -> LabelledFrames:
    """All labelled frames of these recordings, before the protocol's filters."""
    end_us = {r.name: r.end_us for r in data.recordings}
    return labelled_frames(
        [r.name for r in results],
        [end_us[r.name][r.frames] for r in results],
        [r.boxes for r in results],
        [r.detections for r in results],
    )


def score(results: Sequence[RecordingResult], data: Dataset, config: EvaluationConfig) -> Metrics:
    """COCO metrics of all recordings together."""
    return coco_metrics(scored(labelled(results, data), config)[0], data.classes)
