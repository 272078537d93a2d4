"""Named filters from raw boxes to the boxes of frames, each with its count."""

import numpy as np
from evspan.conf.schema.prep import LabelConfig
from evspan.data_prep.labels.box_files import RAW_BOX
from numpy.typing import NDArray


def filter_boxes(
    boxes: NDArray, config: LabelConfig, *, classes: int, height: int, width: int, split: str
) -> tuple[NDArray, dict[str, int]]:
    """Boxes kept (class_id now an index of the dataset's classes), and how many each filter dropped.

    Args:
        boxes: RAW_BOX, pixels of the sensor (height, width).
        classes: how many the dataset has; without a class map, ids from 0 up to it are kept as they are.
    """
    dropped: dict[str, int] = {}

    def keep(reason: str, mask: NDArray[np.bool_]) -> None:
        nonlocal boxes
        dropped[reason] = int(mask.size - np.count_nonzero(mask))
        boxes = boxes[mask]

    class_map = config.class_map or {k: k for k in range(classes)}
    keep("boxes_of_other_classes", np.isin(boxes["class_id"], list(class_map)))
    boxes["class_id"] = [class_map[int(k)] for k in boxes["class_id"]]  # a copy by now
    if config.crop:
        boxes = crop(boxes, height, width)
        keep("boxes_outside_the_sensor", (boxes["w"] > 0) & (boxes["h"] > 0))
    if config.min_side:
        keep(
            "boxes_under_min_side",
            (boxes["w"] >= config.min_side) & (boxes["h"] >= config.min_side),
        )
    if config.min_diagonal:
        keep("boxes_under_min_diagonal", np.hypot(boxes["w"], boxes["h"]) >= config.min_diagonal)
    if config.max_width_fraction is not None and split == "train":
        keep("boxes_over_max_width", boxes["w"] <= config.max_width_fraction * width)
    return boxes, dropped


def crop(boxes: NDArray, height: int, width: int) -> NDArray:
    """Boxes cut at the sensor's border (float32, corners clipped to [0, W-1] and [0, H-1] as RVT does)."""
    out = boxes.astype(RAW_BOX)
    for corner, side, size in (("x", "w", width), ("y", "h", height)):
        low, high = (
            np.clip(v, 0, size - 1, dtype=np.float32)
            for v in (boxes[corner], boxes[corner] + boxes[side])
        )
        out[corner], out[side] = low, high - low
    return out
