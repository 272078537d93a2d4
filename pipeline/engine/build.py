"""Detectors from configs and from weights files."""

import torch

from data_prep.errors import UserError
from pipeline.checkpoint import Weights
from pipeline.model.detector import Detector


def detector_from(weights: Weights, *, device: torch.device | str = "cpu") -> Detector:
    """A detector in eval mode with these weights.

    Raises:
        UserError: the tensors are not those of the model that the file names; lists what is missing and unexpected.
    """
    detector = Detector(weights.model, weights.frames.channels)
    load_tensors(detector, weights)
    return detector.to(device).eval()


def load_tensors(detector: torch.nn.Module, weights: Weights) -> None:
    wanted = detector.state_dict()
    missing, unexpected = sorted(wanted.keys() - weights.tensors.keys()), sorted(weights.tensors.keys() - wanted.keys())
    shapes = [f"{k} {tuple(weights.tensors[k].shape)} for {tuple(v.shape)}" for k, v in wanted.items()
              if k in weights.tensors and weights.tensors[k].shape != v.shape]
    if missing or unexpected or shapes:
        told = "; ".join(f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" for what, names in
                         (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)) if names)
        raise UserError(f"the weights do not fit the model ({told}). Use the model config that they were trained with")
    detector.load_state_dict(weights.tensors)
