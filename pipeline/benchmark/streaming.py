"""Times inference: one frame at a time, and evaluation in chunks of several recordings."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from evspan.conf.schema.training import EvaluationConfig
from evspan.pipeline.benchmark.operations import Operations, count_operations
from evspan.pipeline.benchmark.timing import Spread, synchronize
from evspan.pipeline.data.datasets import Dataset, RecordingData
from evspan.pipeline.inference.streaming import evaluate_split
from evspan.pipeline.inference.trained_detector import TrainedDetector
from torch import Tensor

WARM_UP_FRAMES = 3
FRAMES = 60  # of one recording, repeated
FEWEST_FRAMES = 5
CANDIDATES = 100  # per frame that pass the threshold of an untrained detector


@dataclass(frozen=True)
class StreamingMeasurement:
    """Latency of one frame of one lane, from the frame in host memory to its result there.

    Attributes:
        step: ms, decoded predictions.
        detect: ms, detections: with confidence threshold and NMS.
        detect_graph: the same as one CUDA graph; None on a CPU.
        confidence_threshold: of `detect`.
        candidates: mean number of predictions of a frame above it.
        operations: of `step`.
    """

    step: Spread
    detect: Spread
    detect_graph: Spread | None
    confidence_threshold: float
    candidates: float
    operations: Operations


@torch.inference_mode()
def measure_streaming(
    detector: TrainedDetector,
    data: Dataset,
    *,
    device: torch.device,
    seconds: float,
    confidence_threshold: float | None = None,
) -> StreamingMeasurement:
    """Runs the first frames of a recording one by one.

    Args:
        detector: on `device`.
        seconds: for all of it together, after at least FEWEST_FRAMES frames of each.
        confidence_threshold: of NMS; None: the one that CANDIDATES predictions of a frame pass, as
            the scores of an untrained detector are not meaningful.
    """
    recording = data.recordings[0]
    stored = torch.from_numpy(recording.read(0, min(FRAMES, recording.frames)))
    state = detector.initial_state(1, data.height, data.width)
    warm = list(islice(_endless(stored), WARM_UP_FRAMES))
    for frame in warm:
        decoded, state = detector.step(frame.to(device), state)
    scores = prediction_scores(decoded)
    if confidence_threshold is None:
        highest = scores.topk(min(CANDIDATES, len(scores))).values
        confidence_threshold = float(highest[-1])
    threshold = confidence_threshold

    def step(frame: Tensor) -> None:
        nonlocal state
        decoded, state = detector.step(frame.to(device), state)
        decoded.cpu()

    def detections(*, cuda_graphs: bool) -> Spread:
        stream = detector.frame_stream(
            1,
            data.height,
            data.width,
            confidence_threshold=threshold,
            cuda_graphs=cuda_graphs,
        )
        for frame in warm:
            stream.detect(frame)
        return _latency(stream.detect, stored, device, seconds / 3)

    return StreamingMeasurement(
        step=_latency(step, stored, device, seconds / 3),
        detect=detections(cuda_graphs=False),
        detect_graph=detections(cuda_graphs=True) if device.type == "cuda" else None,
        confidence_threshold=threshold,
        candidates=float((scores >= threshold).sum()),
        operations=count_operations(lambda: step(warm[0]), device, timed=False),
    )


def prediction_scores(decoded: Tensor) -> Tensor:
    """(cells,) objectness * class score of the first frame of decoded predictions (n, cells, c)."""
    return decoded[0, :, 4] * decoded[0, :, 5:].amax(1)


def _endless(frames: Tensor) -> Iterator[Tensor]:
    """One frame (1, C, H, W) after the other, from the start again after the last."""
    while True:
        yield from torch.split(frames, 1)


def _latency(
    call: Callable[[Tensor], object], frames: Tensor, device: torch.device, seconds: float
) -> Spread:
    """Of calls that return when their result is in the host's memory."""
    times_ms: list[float] = []
    deadline = time.perf_counter() + seconds
    synchronize(device)
    for frame in _endless(frames):
        started = time.perf_counter()
        call(frame)
        times_ms.append(1000 * (time.perf_counter() - started))
        is_late = time.perf_counter() > deadline
        if len(times_ms) >= FRAMES or (is_late and len(times_ms) >= FEWEST_FRAMES):
            break
    return Spread.of(times_ms)


@dataclass(frozen=True)
class EvaluationMeasurement:
    """Evaluation of recordings in chunks, with reading, decoding and NMS, without scoring."""

    frames_per_s: float
    frames: int
    lanes: int
    chunk_frames: int


def measure_evaluation(
    detector: TrainedDetector,
    data: Dataset,
    config: EvaluationConfig,
    *,
    device: torch.device,
    seconds: float,
) -> EvaluationMeasurement:
    """Evaluates the beginning of the first recordings: one chunk to warm up, then more.

    Args:
        detector: on `device`.
        seconds: how long it may take; at least one chunk is measured.
    """
    lanes = min(config.batch_size, len(data.recordings))
    config = replace(config, batch_size=lanes)

    def run(chunks: int) -> tuple[int, float]:
        """(frames, seconds) of the first chunks of each lane."""
        parts = [first_frames(r, chunks * config.sequence_length) for r in data.recordings[:lanes]]
        started = time.perf_counter()
        evaluate_split(
            detector, replace(data, recordings=parts), config, device=device, recordings=parts
        )
        synchronize(device)
        return sum(part.frames for part in parts), time.perf_counter() - started

    _, first_s = run(1)
    chunks = max(1, min(10, int(seconds / first_s)))
    frames, elapsed_s = run(chunks)
    return EvaluationMeasurement(frames / elapsed_s, frames, lanes, config.sequence_length)


def first_frames(recording: RecordingData, frames: int) -> RecordingData:
    """A recording that ends after this number of frames, or as it did if it is shorter."""
    return replace(
        recording,
        end_us=recording.end_us[:frames],
        labelled=recording.labelled[:frames],
        box_start=recording.box_start[: frames + 1],
    )
