"""Builds detectors from weights."""

from collections.abc import Mapping, Sequence

import torch
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import FrameConfig
from evspan.conf.schema.training import Precision
from evspan.conf.text import printable
from evspan.pipeline.inference.precision import cast_weights, float32_kernels, run_precision
from evspan.pipeline.inference.streaming_detector import StreamingDetector, StreamingOptions
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.inputs import limits_from
from evspan.pipeline.model.state import DetectorState
from evspan.pipeline.weights import Weights
from torch import Tensor

SHOWN_NAMES = 3  # of tensors that are missing, unexpected or of another shape
MOST_NAME = 200  # characters of such a name, and its shape


class TrainedDetector(Detector):
    """A detector with what it was trained on.

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

    def stream(
        self,
        batch: int,
        height: int,
        width: int,
        *,
        confidence_threshold: float | None = None,
        nms_threshold: float | None = None,
        cuda_graphs: bool = False,
    ) -> StreamingDetector:
        """Follows recordings frame by frame, and holds their state.

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
        default = self.config.postprocess
        limits = limits_from(
            default.confidence_threshold if confidence_threshold is None else confidence_threshold,
            default.nms_threshold if nms_threshold is None else nms_threshold,
        )
        options = StreamingOptions(batch, height, width, limits, cuda_graphs=cuda_graphs)
        return StreamingDetector(self, options)


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
