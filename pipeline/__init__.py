"""For programs that run a trained detector: `load_detector`. Importing it does not import torch."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from evspan.pipeline.inference.trained_detector import TrainedDetector

__all__ = ["load_detector"]


def load_detector(
    path: "str | Path",
    *,
    device: "torch.device | str" = "cpu",
    precision: str = "auto",
) -> "TrainedDetector":
    """Loads a trained detector, in eval mode.

    >>> from evspan.pipeline import load_detector
    >>> detector = load_detector("runs/base", device="cuda")
    >>> for time_us, detections in detector.stream("drive.raw"):
    ...     print(time_us, detections["class_id"], detections["class_confidence"])

    Args:
        path: a run folder (its newest checkpoint), one of its checkpoints, a .safetensors file, or
            a published .ckpt of RVT. For a .ckpt, settings that weights do not show are RVT's;
            `evspan convert` takes other values.
        precision: "fp32", "tf32" or "bf16"; "auto": that of training on a GPU, fp32 on a CPU.

    Returns:
        The detector, with `classes` (names by class id), `frames` (how events become its frames),
        `stream` for recordings, `frame_stream`, `detect` and `step` for frames.

    Raises:
        evspan.conf.errors.UserError: there is no such file, it is no checkpoint of this detector,
            or there is no such precision.
    """
    from evspan.conf.errors import UserError
    from evspan.pipeline.inference.precision import parse_precision
    from evspan.pipeline.inference.trained_detector import detector_from
    from evspan.pipeline.rvt_checkpoint import open_weights

    chosen = parse_precision(precision)
    weights = open_weights(path)
    try:
        return detector_from(weights, device=device, precision=chosen)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
