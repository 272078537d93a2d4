"""Named filters from the boxes of a box file to the boxes of frames; each counts what it drops."""

import numpy as np
from evspan.conf.schema.prep import LabelConfig
from evspan.data_prep.labels.box_files import RAW_BOX, BoxArray
from numpy.typing import NDArray


def filter_boxes(
    boxes: BoxArray, config: LabelConfig, *, classes: int, height: int, width: int, split: str
) -> tuple[BoxArray, dict[str, int]]:
    """Applies the filters of `config`, each to the boxes that the one before has kept.

    Args:
        boxes: (N,) RAW_BOX, pixels of the sensor.
        classes: number of classes of the dataset. Without a class map, the ids below it are kept
            as they are.
        height, width: of the sensor, in pixels.

    Returns:
        (K,) RAW_BOX, K <= N, where class_id is an index of the dataset's classes; and the number
        of dropped boxes by the name of the filter.
    """
    dropped: dict[str, int] = {}

    def keep(boxes: BoxArray, mask: NDArray[np.bool_], reason: str) -> BoxArray:
        dropped[reason] = int(np.count_nonzero(~mask))
        return boxes[mask]

    class_map = config.class_map or {k: k for k in range(classes)}
    known = np.isin(boxes["class_id"], list(class_map))
    boxes = keep(boxes, known, "boxes_of_other_classes")  # a copy, which may be changed
    boxes["class_id"] = [class_map[int(k)] for k in boxes["class_id"]]
    if config.crop:
        boxes = crop(boxes, height, width)
        inside = (boxes["w"] > 0) & (boxes["h"] > 0)
        boxes = keep(boxes, inside, "boxes_outside_the_sensor")
    if config.min_side:
        large = (boxes["w"] >= config.min_side) & (boxes["h"] >= config.min_side)
        boxes = keep(boxes, large, "boxes_under_min_side")
    if config.min_diagonal:
        large = np.hypot(boxes["w"], boxes["h"]) >= config.min_diagonal
        boxes = keep(boxes, large, "boxes_under_min_diagonal")
    if config.max_width_fraction is not None and split == "train":
        narrow = boxes["w"] <= config.max_width_fraction * width
        boxes = keep(boxes, narrow, "boxes_over_max_width")
    return boxes, dropped


def filter_regions(
    regions: BoxArray, config: LabelConfig, *, height: int, width: int
) -> tuple[BoxArray, int]:
    """Cuts ignore regions at the sensor's border, where boxes are cut.

    Filters of classes and sizes do not apply: a region has no class, and one of any size hides what
    is in it.

    Args:
        regions: (R,) RAW_BOX, pixels of the sensor.
        height, width: of the sensor, in pixels.

    Returns:
        (K,) RAW_BOX, K <= R, and the number of regions that lie outside. Regions without an area,
        which mark labelled frames, are neither.
    """
    regions = regions[(regions["w"] > 0) & (regions["h"] > 0)]
    if not config.crop:
        return regions, 0
    cut = crop(regions, height, width)
    kept = cut[(cut["w"] > 0) & (cut["h"] > 0)]
    return kept, regions.size - kept.size


def crop(boxes: BoxArray, height: int, width: int) -> BoxArray:
    """Cuts boxes at the sensor's border, in float32 as RVT does.

    Args:
        boxes: (N,) RAW_BOX, pixels of the sensor.
        height, width: of the sensor, in pixels.

    Returns:
        (N,) RAW_BOX with corners clipped to [0, width - 1] and [0, height - 1]. A box that lies
        wholly outside gets a width or height of 0.
    """
    out = boxes.astype(RAW_BOX)
    for corner, side, size in (("x", "w", width), ("y", "h", height)):
        low = np.clip(boxes[corner], 0, size - 1, dtype=np.float32)
        high = np.clip(boxes[corner] + boxes[side], 0, size - 1, dtype=np.float32)
        out[corner] = low
        out[side] = high - low
    return out
