"""Builds detectors from weights."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import FrameConfig, TimeUnit
from evspan.conf.schema.training import Precision
from evspan.conf.text import printable
from evspan.data_prep.frames.stream import EventSource, as_recording, follow, windows
from evspan.data_prep.recordings.arrays import ArrayRecording
from evspan.pipeline.inference.detect import WorkTimer, class_name, detect
from evspan.pipeline.inference.options import InferOptions
from evspan.pipeline.inference.precision import cast_weights, float32_kernels, run_precision
from evspan.pipeline.inference.streaming_detector import StreamingDetector, StreamingOptions
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.inputs import check_positive, limits_from
from evspan.pipeline.model.postprocess import DetectionLimits
from evspan.pipeline.model.state import DetectorState
from evspan.pipeline.weights import Weights
from numpy.typing import NDArray
from torch import Tensor

SHOWN_NAMES = 3  # of tensors that are missing, unexpected or of another shape
MOST_NAME = 200  # characters of such a name, and its shape


class FrameDetections(NamedTuple):
    """time_us: end of the window. detections: (k,) RAW_BOX, pixels of the sensor."""

    time_us: int
    detections: NDArray[np.void]


class TrainedDetector(Detector):
    """A detector with what it was trained on; `evspan.pipeline.load_detector` makes it.

    `stream` takes recordings, growing files or arrays of events. `frame_stream`, `detect` and
    `step` take frames.

    classes: names by class id; the head may have more classes. frames: how events became the frames
    that it takes. precision: in which it runs.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights.model, weights.frames.channels)
        self.classes: list[str] = list(weights.classes)
        self.frames: FrameConfig = weights.frames
        self.precision = Precision.fp32

    def forward(
        self,
        frames: Tensor,
        state: DetectorState,
        *,
        starts: Tensor | None = None,
        labelled: Tensor | None = None,
        following: Tensor | None = None,
    ) -> tuple[Tensor, DetectorState]:
        """`Detector.forward` in its precision.

        Raises:
            InputError: frames or state of other channels, sizes, dtypes or devices.
        """
        self.check_inputs(frames, state, starts, labelled)
        with float32_kernels(self.precision, frames.device):
            return super().forward(
                frames, state, starts=starts, labelled=labelled, following=following
            )

    def initial_state(
        self,
        batch: int,
        height: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> DetectorState:
        """Zeros for `batch` lanes of frames (height, width).

        By default on its own device, in the dtype of its weights.
        """
        weight = next(self.parameters())
        if device is None:
            device = weight.device
        if dtype is None:
            dtype = weight.dtype
        return super().initial_state(batch, height, width, device=device, dtype=dtype)

    def class_name(self, class_id: int) -> str:
        """The name of a class, "class 3" for one of the head that has none."""
        return class_name(self.classes, class_id)

    def stream(
        self,
        source: EventSource,
        *,
        confidence_threshold: float | None = None,
        nms_threshold: float | None = None,
        sensor_size: Sequence[int] | None = None,
        time_unit: TimeUnit | str | None = None,
        follow_s: float | None = None,
        stop: Callable[[], bool] | None = None,
        frames_per_call: int | None = None,
        cuda_graphs: bool = False,
    ) -> Iterator[FrameDetections]:
        """Detects in a recording, in a file that still grows, or in arrays of events.

        Yields the detections of each window: those that `evspan infer` writes, bit for bit with
        as many frames per call. Memory does not grow with the recording.

        >>> detector = load_detector("runs/base")
        >>> for time_us, detections in detector.stream("drive.raw", confidence_threshold=0.3):
        ...     for box in detections:
        ...         print(time_us, detector.class_name(box["class_id"]), box["x"], box["y"])

        Args:
            source: the path of a recording of any format; or an iterable of blocks of events in the
                order of time, each (t, x, y, p) or a structured array with these fields: t in
                microseconds, integers; p 0 or -1 darker, 1 brighter. For arrays, pass
                `sensor_size`.
            confidence_threshold: lowest objectness * class score; None: the model config's.
            nms_threshold: IoU threshold of the suppression; None: the model config's.
            sensor_size: (height, width) in pixels; of files, for those that do not state it.
            time_unit: "s", "ms", "us" or "ns" of the times in a text file or NumPy archive where it
                is not certain.
            follow_s: the file (.raw, .dat) still grows: wait at its end until nothing comes for so
                many seconds.
            stop: is called while a growing file is waited for and between its blocks; true ends it.
            frames_per_call: frames that the network takes at once; on a CPU, another number can
                change the last bit of a result. None: 4 of a complete file, as `evspan infer`;
                else 1, so that a window's detections come with the first event after it.
            cuda_graphs: run network, thresholds and NMS as one launch of a GPU.

        Yields:
            (time_us, detections): the end of the window, and (k,) records with t, x, y, w, h
            (pixels of the sensor, top left corner), class_id and class_confidence, the most
            confident first.

        Raises:
            UserError: the events cannot be read or there are none; CUDA graphs are requested, and
                the detector is not on a GPU.
            InputError: a threshold is outside 0..1, or frames_per_call is less than 1.
        """
        if frames_per_call is not None:
            check_positive(frames_per_call=frames_per_call)
        unit = TimeUnit(time_unit) if isinstance(time_unit, str) else time_unit
        recording = as_recording(source, sensor_size=sensor_size, time_unit=unit)
        if follow_s is not None:
            follow(recording, follow_s, stop)
        if frames_per_call is None:
            is_complete = follow_s is None and not isinstance(recording, ArrayRecording)
            frames_per_call = InferOptions.frames_per_call if is_complete else 1
        limits = self._limits(confidence_threshold, nms_threshold)
        detected = detect(
            self,
            windows(recording, self.frames),
            confidence=limits.confidence_threshold,
            nms=limits.nms_threshold,
            frames_per_call=frames_per_call,
            downsample=self.frames.downsample,
            sensor=(recording.height, recording.width),
            clock=WorkTimer(),
            cuda_graphs=cuda_graphs,
        )
        return (FrameDetections(item.end_us, item.boxes) for item in detected)

    def frame_stream(
        self,
        batch: int,
        height: int,
        width: int,
        *,
        confidence_threshold: float | None = None,
        nms_threshold: float | None = None,
        cuda_graphs: bool = False,
    ) -> StreamingDetector:
        """Runs on frames that the program makes itself, and holds the state of their recordings.

        >>> stream = detector.frame_stream(batch=1, height=360, width=640)
        >>> for end_us, frame in frames_of("drive.raw", detector.frames):
        ...     (detections,) = stream.detect(frame[None])

        Args:
            batch: number of recordings side by side.
            height, width: of the frames, in pixels.
            confidence_threshold: lowest objectness * class score; None: the model config's.
            nms_threshold: IoU threshold of the suppression; None: the model config's.
            cuda_graphs: run network, thresholds and NMS as one launch of a GPU.

        Raises:
            UserError: CUDA graphs are requested, and the detector is not on a GPU.
            InputError: a threshold is outside 0..1, or there are no lanes or pixels.
        """
        limits = self._limits(confidence_threshold, nms_threshold)
        options = StreamingOptions(batch, height, width, limits, cuda_graphs=cuda_graphs)
        return StreamingDetector(self, options)

    def _limits(self, confidence: float | None, nms: float | None) -> DetectionLimits:
        """The thresholds, by default the model config's."""
        default = self.config.postprocess
        return limits_from(
            default.confidence_threshold if confidence is None else confidence,
            default.nms_threshold if nms is None else nms,
        )


def detector_from(
    weights: Weights,
    *,
    device: torch.device | str = "cpu",
    precision: Precision = Precision.auto,
) -> TrainedDetector:
    """A detector in eval mode with these weights.

    Args:
        precision: in which it runs; auto: that of training on a GPU, fp32 on a CPU.

    Raises:
        UserError: the tensors do not fit the model config; names some missing and unexpected ones.
    """
    check_fit(weights)
    detector = TrainedDetector(weights)
    detector.load_state_dict(weights.tensors)
    detector.precision = run_precision(precision, weights.precision, torch.device(device))
    cast_weights(detector, detector.precision)
    return detector.to(device).eval()


def check_fit(weights: Weights) -> None:
    """Checks that the tensors fit the model config. Allocates nothing.

    Raises:
        UserError: they do not; names some missing and unexpected ones.
    """
    with torch.device("meta"):
        expected = Detector(weights.model, weights.frames.channels).state_dict()
    _check_names_and_shapes(expected, weights.tensors)


def _check_names_and_shapes(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> None:
    missing = sorted(expected.keys() - actual.keys())
    unexpected = sorted(actual.keys() - expected.keys())
    other_shape = [
        f"{_with_shape(name, actual)} for {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in actual and actual[name].shape != tensor.shape
    ]
    problems = {
        "missing": [_with_shape(name, expected) for name in missing],
        "unexpected": [_with_shape(name, actual) for name in unexpected],
        "of another shape": other_shape,
    }
    lists = [f"{len(names)} {kind}: {_shown(names)}" for kind, names in problems.items() if names]
    if lists:
        raise UserError(
            "the weights do not fit the model. Use the model config that they were trained with, "
            f"or another file. Of {len(expected)} tensors: {'; '.join(lists)}"
        )


def _shown(names: Sequence[str]) -> str:
    """The first few of them."""
    shown = [printable(name)[:MOST_NAME] for name in names[:SHOWN_NAMES]]
    if len(names) > SHOWN_NAMES:
        shown.append("...")
    return ", ".join(shown)


def _with_shape(name: str, tensors: Mapping[str, Tensor]) -> str:
    return f"{name} {tuple(tensors[name].shape)}"
