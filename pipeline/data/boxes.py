"""Converts stored boxes into the arrays that losses and metrics take."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def to_center(boxes: NDArray[Any]) -> NDArray[np.float32]:
    """(n,) structured boxes (`shards.format.BOX`) -> (n, 5) class, cx, cy, w, h in pixels."""
    columns = (
        boxes["class_id"],
        boxes["x"] + boxes["w"] / 2,
        boxes["y"] + boxes["h"] / 2,
        boxes["w"],
        boxes["h"],
    )
    return np.stack(columns, axis=-1).astype(np.float32).reshape(-1, 5)


def to_corners(boxes: NDArray[Any]) -> NDArray[np.float32]:
    """(n,) structured boxes (`shards.format.BOX`) -> (n, 4) x1, y1, x2, y2 in pixels."""
    columns = (boxes["x"], boxes["y"], boxes["x"] + boxes["w"], boxes["y"] + boxes["h"])
    return np.stack(columns, axis=-1).astype(np.float32).reshape(-1, 4)
