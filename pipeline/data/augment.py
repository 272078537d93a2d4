"""Flip and zoom, drawn once per lane and sequence and applied alike to all its frames and boxes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.config import AugmentationConfig
from pipeline.data.plan import Chunk, generator

MIN_VISIBLE = 1.0  # pixels a side; less of a box than this is no label


@dataclass(frozen=True)
class Augmentation:
    """Output pixel (y, x) shows input pixel ((y - top) / zoom, (x - left) / zoom), mirrored first where flipped."""

    flip: bool = False
    zoom: float = 1.0
    top: float = 0.0
    left: float = 0.0


def draw_augmentation(config: AugmentationConfig, chunk: Chunk, *, seed: int, height: int, width: int) -> Augmentation:
    """Streamed lanes only zoom out: a window moved in would lose objects that the carried state has seen."""
    rng = generator(seed, 2, int(chunk.streamed), *chunk.draw)
    flip, zooms, inwards, amount, v, u = rng.random(6)
    zoom = 1.0
    if zooms < config.zoom:
        zoom = 1 + amount * (config.zoom_in - 1)
        if chunk.streamed or inwards >= config.zoom_in_share:
            zoom = 1 / (1 + amount * (config.zoom_out - 1))
    return Augmentation(flip=bool(flip < config.hflip), zoom=zoom,
                        top=float(v * height * (1 - zoom)), left=float(u * width * (1 - zoom)))


def augment_frames(frames: NDArray[np.uint8], how: Augmentation) -> NDArray[np.uint8]:
    """(T, C, H, W) -> the same shape; nearest pixel, zero outside."""
    if how == Augmentation():
        return frames
    rows, rows_in = _source(frames.shape[2], how.top, how.zoom)
    columns, columns_in = _source(frames.shape[3], how.left, how.zoom)
    if how.flip:
        columns = frames.shape[3] - 1 - columns
    if how.zoom == 1:
        return np.ascontiguousarray(frames[..., columns])
    out = np.zeros_like(frames)
    out[:, :, rows_in, columns_in] = frames.take(rows[rows_in], axis=2).take(columns[columns_in], axis=3)
    return out


def _source(size: int, offset: float, zoom: float) -> tuple[NDArray[np.int64], slice]:
    """For every output pixel the input pixel that it shows, and the run of output pixels for which there is one."""
    source = np.floor((np.arange(size) + 0.5 - offset) / zoom).astype(np.int64)
    inside = np.flatnonzero((source >= 0) & (source < size))
    return source, slice(int(inside[0]), int(inside[-1]) + 1)


def augment_boxes(boxes: NDArray[np.float32], how: Augmentation, *, height: int, width: int) -> NDArray[np.float32]:
    """(n, 5) class, cx, cy, w, h in pixels -> (m <= n, 5), cut at the frame's border."""
    if how == Augmentation() or not len(boxes):
        return boxes
    kind, x, y, w, h = boxes.T
    if how.flip:
        x = width - x
    x0, x1 = (np.clip((x + s * w / 2) * how.zoom + how.left, 0, width) for s in (-1, 1))
    y0, y1 = (np.clip((y + s * h / 2) * how.zoom + how.top, 0, height) for s in (-1, 1))
    out = np.stack((kind, (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), axis=1).astype(np.float32)
    return out[(out[:, 3] >= MIN_VISIBLE) & (out[:, 4] >= MIN_VISIBLE)]
