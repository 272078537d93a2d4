"""For programs that run a trained detector: `load_detector`. Importing it does not import torch."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from evspan.pipeline.inference.trained_detector import TrainedDetector

__all__ = ["load_detector"]


def load_detector(path: "str | Path", *, device: "torch.device | str" = "cpu") -> "TrainedDetector":
    """Loads a trained detector, in eval mode.

    Args:
        path: a run folder (its newest checkpoint), one of its checkpoints, a .safetensors file, or
            a published .ckpt of RVT. For a .ckpt, settings that weights do not show are RVT's;
            `evspan convert` takes other values.

    Returns:
        The detector, with `classes` (names by class id), `frames` (how events become its frames),
        `initial_state`, `step` and `detect`.

    Raises:
        evspan.conf.errors.UserError: there is no such file, or it is no checkpoint of this
            detector.
    """
    from evspan.pipeline.inference.trained_detector import detector_from
    from evspan.pipeline.rvt_checkpoint import open_weights

    return detector_from(open_weights(path), device=device)
