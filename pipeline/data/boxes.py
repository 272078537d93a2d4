"""Converts stored boxes into the arrays that losses and metrics take, and compares boxes."""

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


def corners_of(boxes: NDArray[np.void]) -> NDArray[np.float64]:
    """(n,) structured boxes of any kind -> (n, 4) float64 x1, y1, x2, y2 in pixels."""
    x, y, w, h = (boxes[name].astype(np.float64) for name in "xywh")
    return np.stack((x, y, x + w, y + h), 1)


def pairwise_iou(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, m) IoU of corners (n, 4) and (m, 4); 0 where both have no area."""
    shared = _shared_areas(a, b)
    union = _areas(a)[:, None] + _areas(b) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def covered_fraction(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, m) the fraction of each box of a (n, 4) that each of b (m, 4) covers."""
    shared = _shared_areas(a, b)
    areas = np.broadcast_to(_areas(a)[:, None], shared.shape)
    return np.divide(shared, areas, out=np.zeros_like(shared), where=areas > 0)


def _shared_areas(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared: NDArray[np.float64] = np.prod((high - low).clip(min=0), axis=-1)
    return shared


def _areas(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    areas: NDArray[np.float64] = np.prod((corners[:, 2:] - corners[:, :2]).clip(min=0), axis=-1)
    return areas
