"""Flip and zoom, drawn once per lane and sequence and applied alike to all its frames and boxes."""

from dataclasses import dataclass

import numpy as np
from evspan.conf.schema.training import AugmentationConfig
from evspan.data_prep.frames.codec import gather_cells
from evspan.pipeline.data.plan import Chunk, generator
from numpy.typing import NDArray

MIN_VISIBLE = 1.0  # pixels a side; less of a box than this is no label


@dataclass(frozen=True)
class Augmentation:
    """Output pixel (y, x) shows input pixel ((y - top) / zoom, (x - left) / zoom), mirrored first where flipped."""

    flip: bool = False
    zoom: float = 1.0
    top: float = 0.0
    left: float = 0.0


def draw_augmentation(
    config: AugmentationConfig, chunk: Chunk, *, seed: int, height: int, width: int
) -> Augmentation:
    """Streamed lanes only zoom out: a window moved in would lose objects that the carried state has seen."""
    rng = generator(seed, 2, int(chunk.streamed), *chunk.draw)
    flip, zooms, inwards, amount, v, u = rng.random(6)
    zoom = 1.0
    if zooms < config.zoom_prob:
        zoom = 1 + amount * (config.zoom_in - 1)
        if chunk.streamed or inwards >= config.zoom_in_fraction:
            zoom = 1 / (1 + amount * (config.zoom_out - 1))
    return Augmentation(
        flip=bool(flip < config.hflip_prob),
        zoom=zoom,
        top=float(v * height * (1 - zoom)),
        left=float(u * width * (1 - zoom)),
    )


def augment_frames(frames: NDArray[np.uint8], how: Augmentation, out: NDArray[np.uint8]) -> None:
    """(T, C, H, W) into `out`, zeros of the same shape; nearest pixel, zero outside. A frame of each lies in one piece."""
    if how == Augmentation():
        out[:] = frames
        return
    height, width = frames.shape[2:]
    rows, columns = _source(height, how.top, how.zoom), _source(width, how.left, how.zoom)
    if how.flip:
        columns = np.where(columns < 0, -1, width - 1 - columns)
    for frame, augmented in zip(frames, out, strict=True):
        gather_cells(frame, rows, columns, augmented)


def _source(size: int, offset: float, zoom: float) -> NDArray[np.int64]:
    """For every output pixel the input pixel that it shows; -1: none."""
    source = np.floor((np.arange(size) + 0.5 - offset) / zoom).astype(np.int64)
    return np.where((source >= 0) & (source < size), source, -1)


def augment_boxes(
    boxes: NDArray[np.float32], how: Augmentation, *, height: int, width: int
) -> NDArray[np.float32]:
    """(n, 5) class, cx, cy, w, h in pixels -> (m <= n, 5), cut at the frame's border."""
    if how == Augmentation() or not len(boxes):
        return boxes
    kind, x, y, w, h = boxes.T
    if how.flip:
        x = width - x
    x0, x1 = (np.clip((x + s * w / 2) * how.zoom + how.left, 0, width) for s in (-1, 1))
    y0, y1 = (np.clip((y + s * h / 2) * how.zoom + how.top, 0, height) for s in (-1, 1))
    out = np.stack((kind, (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0), axis=1).astype(
        np.float32
    )
    return out[(out[:, 3] >= MIN_VISIBLE) & (out[:, 4] >= MIN_VISIBLE)]
