"""Detectors from configs and from weights files."""

from collections.abc import Mapping

import torch
from evspan.conf.errors import UserError
from evspan.conf.schema.prep import FrameConfig
from evspan.pipeline.model.detector import Detector
from evspan.pipeline.model.state import DetectorState
from evspan.pipeline.weights import Weights
from torch import Tensor


class TrainedDetector(Detector):
    """A detector that knows what it was trained on.

    classes: names, in the order of class ids; a head may have more. frames: how events became the frames that it takes.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights.model, weights.frames.channels)
        self.classes: list[str] = list(weights.classes)
        self.frames: FrameConfig = weights.frames

    def initial_state(
        self,
        batch: int,
        height: int,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> DetectorState:
        """Zeros for `batch` lanes of frames (height, width), on the detector's device unless told otherwise."""
        device = next(self.parameters()).device if device is None else device
        return super().initial_state(batch, height, width, device=device, dtype=dtype)


def detector_from(weights: Weights, *, device: torch.device | str = "cpu") -> TrainedDetector:
    """A detector in eval mode with these weights.

    Raises:
        UserError: the tensors are not those of the model that the file names; lists what is missing and unexpected.
    """
    check_fit(weights)
    detector = TrainedDetector(weights)
    detector.load_state_dict(weights.tensors)
    return detector.to(device).eval()


def check_fit(weights: Weights) -> None:
    """Raises UserError as `detector_from` does; nothing is allocated."""
    with torch.device("meta"):
        wanted = Detector(weights.model, weights.frames.channels).state_dict()
    _refuse_misfits(wanted, weights.tensors)


def load_tensors(detector: torch.nn.Module, weights: Weights) -> None:
    _refuse_misfits(detector.state_dict(), weights.tensors)
    detector.load_state_dict(weights.tensors)


def _refuse_misfits(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    def told(name: str, tensors: Mapping[str, Tensor]) -> str:
        return f"{name} {tuple(tensors[name].shape)}"

    found = {
        "missing": [told(k, wanted) for k in sorted(wanted.keys() - given.keys())],
        "unexpected": [told(k, given) for k in sorted(given.keys() - wanted.keys())],
        "of another shape": [
            f"{told(k, given)} for {tuple(v.shape)}"
            for k, v in wanted.items()
            if k in given and given[k].shape != v.shape
        ],
    }
    if any(found.values()):
        lists = "; ".join(
            f"{len(names)} {what}: {', '.join(names)}" for what, names in found.items() if names
        )
        raise UserError(
            f"the weights do not fit the model. Use the model config that they were trained with, or another file. "
            f"Of {len(wanted)} tensors: {lists}"
        )
