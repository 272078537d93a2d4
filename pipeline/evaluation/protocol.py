"""The protocol of an evaluation: which boxes and detections are scored, by name."""

from dataclasses import dataclass, replace

from evspan.conf.schema.training import EvaluationConfig
from evspan.pipeline.data.datasets import Dataset

PROPHESEE = "Prophesee's protocol"
COCO = "COCO AP"


@dataclass(frozen=True)
class BoxLimits:
    """The smallest boxes that are scored. min_side, min_diagonal: in pixels of the sensor."""

    min_side: float
    min_diagonal: float


# Prophesee's toolbox (metavision_ml and prophesee-automotive-dataset-toolbox), per sensor.
PROPHESEE_LIMITS = {
    (240, 304): BoxLimits(10, 30),  # Gen1
    (720, 1280): BoxLimits(20, 60),  # 1 Megapixel
}
# Datasets that are scored by it, as `dataset.name`. RVT's trees are of them too.
PROPHESEE_DATASETS = ("gen1", "gen1_rvt", "gen4", "gen4_rvt", "rvt_tree")


def protocol_of(config: EvaluationConfig, data: Dataset) -> EvaluationConfig:
    """The config with its minimum sizes, which follow the dataset where they are not given.

    Prophesee's datasets have those of Prophesee's toolbox. Of any other dataset, boxes that
    `evspan prep` left out for their size are not scored, and detections of that size neither.

    Returns:
        A config whose min_side and min_diagonal are numbers, in pixels of the stored frames.
    """
    limits = BoxLimits(data.min_side, data.min_diagonal)
    if data.name in PROPHESEE_DATASETS:
        limits = PROPHESEE_LIMITS.get(_sensor_size(data), limits)
    min_side = config.min_side
    min_diagonal = config.min_diagonal
    if min_side is None:
        min_side = limits.min_side / data.frames.downsample
    if min_diagonal is None:
        min_diagonal = limits.min_diagonal / data.frames.downsample
    return replace(config, min_side=min_side, min_diagonal=min_diagonal)


def protocol_name(config: EvaluationConfig, data: Dataset) -> str:
    """'Prophesee's protocol' where all filters are those of its toolbox, else 'COCO AP'.

    Args:
        config: from `protocol_of`.
    """
    limits = PROPHESEE_LIMITS.get(_sensor_size(data))
    if limits is None or config.min_side is None or config.min_diagonal is None:
        return COCO
    scale = data.frames.downsample
    same_sizes = BoxLimits(scale * config.min_side, scale * config.min_diagonal) == limits
    if same_sizes and config.skip_first_ms == 500 and config.skip_empty_frames:
        return PROPHESEE
    return COCO


def protocol_line(config: EvaluationConfig, data: Dataset) -> str:
    """The protocol in one line, for the results.

    Args:
        config: from `protocol_of`.
    """
    sizes = "boxes of any size"
    if config.min_side or config.min_diagonal:
        sizes = (
            f"boxes and detections of side >= {config.min_side or 0:g} and diagonal >= "
            f"{config.min_diagonal or 0:g} pixels of the stored frames"
        )
    parts = [sizes]
    if config.skip_first_ms:
        parts.append(f"without the first {config.skip_first_ms / 1000:g} s")
    if config.skip_empty_frames:
        parts.append("without frames that have no box")
    parts.append(f"confidence >= {config.confidence_threshold:g}, NMS {config.nms_threshold:g}")
    return f"{protocol_name(config, data)}: {', '.join(parts)}"


def _sensor_size(data: Dataset) -> tuple[int, int]:
    """Height and width of the sensor. RVT's frames lose up to a row or column of a block."""
    scale = data.frames.downsample
    return data.height * scale, data.width * scale
