"""For programs that use a detector: `load_detector`."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from evspan.pipeline.inference.trained_detector import TrainedDetector

__all__ = ["load_detector"]


def load_detector(path: "str | Path", *, device: "torch.device | str" = "cpu") -> "TrainedDetector":
    """A trained detector, in eval mode.

    Args:
        path: a run folder (its newest checkpoint), one of its checkpoints, a .safetensors file, or a published .ckpt of RVT,
            of which what weights do not tell is taken to be as RVT has it (`evspan convert` takes other values).
    Returns:
        the detector: `classes` (names by class id), `frames` (how events become its frames), `initial_state`, `step`, `detect`.
    Raises:
        evspan.conf.errors.UserError: nothing there, not a checkpoint, or not one of this detector.
    """
    from evspan.pipeline.inference.trained_detector import detector_from
    from evspan.pipeline.rvt_checkpoint import open_weights

    return detector_from(open_weights(path), device=device)
