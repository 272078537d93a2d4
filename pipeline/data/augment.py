"""Flip and zoom, drawn once per lane and sequence and applied alike to all its frames and boxes."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from evspan.conf.schema.training import AugmentationConfig
from evspan.data_prep.frames.codec import decode_into, decode_moved, gather_cells
from evspan.pipeline.data.datasets import FrameCodes
from evspan.pipeline.data.plan import Chunk, generator
from numpy.typing import NDArray

MIN_VISIBLE = 1.0  # pixels per side; a box of which less is visible is dropped


@dataclass(frozen=True)
class Augmentation:
    """Output pixel (y, x) shows input pixel ((y - top) / zoom, (x - left) / zoom).

    With `flip` the input is mirrored first. top, left: in pixels.
    """

    flip: bool = False
    zoom: float = 1.0
    top: float = 0.0
    left: float = 0.0


def draw_augmentation(
    config: AugmentationConfig, chunk: Chunk, *, seed: int, height: int, width: int
) -> Augmentation:
    """Draws the augmentation of a chunk's sequence.

    Streamed lanes only zoom out: zooming in would lose objects that the carried state has seen.

    Args:
        chunk: names the sequence; all chunks of a sequence give the same augmentation.
        seed: of the run.
        height, width: of the frames, in pixels.
    """
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


def augment_frames(
    frames: NDArray[np.uint8], augmentation: Augmentation, out: NDArray[np.uint8]
) -> None:
    """Writes the augmented frames: nearest pixel, zero outside.

    Args:
        frames: (T, C, H, W).
        out: the same shape, zeros. Each frame of both is contiguous.
    """
    if augmentation == Augmentation():
        out[:] = frames
        return
    rows, columns = source_maps(augmentation, *frames.shape[2:])
    for frame, augmented in zip(frames, out, strict=True):
        gather_cells(frame, rows, columns, augmented)


def decode_augmented(
    frames: FrameCodes, augmentation: Augmentation, out: NDArray[np.uint8]
) -> None:
    """Writes the augmented frames as `augment_frames` does.

    Args:
        frames: n frames.
        out: (n, C, H, W) zeros. Each frame is contiguous.
    """
    if augmentation == Augmentation():
        decode_into(frames.code, frames.start, out)
        return
    rows, columns = source_maps(augmentation, *out.shape[2:])
    decode_moved(frames.code, frames.start, rows, columns, out)


def source_maps(
    augmentation: Augmentation, height: int, width: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The input row of each output row (H,), and the same for columns (W,); -1: none."""
    rows = _source_pixels(height, augmentation.top, augmentation.zoom)
    columns = _source_pixels(width, augmentation.left, augmentation.zoom)
    if augmentation.flip:
        columns = np.where(columns < 0, -1, width - 1 - columns)
    return rows, columns


def _source_pixels(size: int, offset: float, zoom: float) -> NDArray[np.int64]:
    """(size,) the input pixel that each output pixel shows; -1: none."""
    source = np.floor((np.arange(size) + 0.5 - offset) / zoom).astype(np.int64)
    return np.where((source >= 0) & (source < size), source, -1)


def augment_boxes(
    boxes: NDArray[np.float32], augmentation: Augmentation, *, height: int, width: int
) -> NDArray[np.float32]:
    """Augments boxes and cuts them at the frame's border.

    Args:
        boxes: (n, 5) class, cx, cy, w, h in pixels.
        height, width: of the frames, in pixels.

    Returns:
        (m, 5), without boxes of which less than MIN_VISIBLE pixels per side are left.
    """
    moved, visible = _move_boxes(boxes, augmentation, height, width)
    return moved[visible]


def augment_box_rows(
    boxes: NDArray[np.float32],
    counts: NDArray[np.int64],
    augmentation: Augmentation,
    *,
    height: int,
    width: int,
) -> list[NDArray[np.float32]]:
    """`augment_boxes` of several frames at once.

    Args:
        boxes: (n, 5) of all frames, one frame after the other.
        counts: (T,) how many boxes each frame has.
        height, width: of the frames, in pixels.

    Returns:
        Of each frame what is left, (m, 5).
    """
    moved, visible = _move_boxes(boxes, augmentation, height, width)
    kept_before = np.concatenate(([0], np.cumsum(visible)))
    starts = kept_before[np.concatenate(([0], np.cumsum(counts)))].tolist()
    kept = moved[visible]
    return [kept[first:last] for first, last in pairwise(starts)]


def _move_boxes(
    boxes: NDArray[np.float32], augmentation: Augmentation, height: int, width: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The augmented boxes (n, 5), and which of them are visible (n,)."""
    if augmentation == Augmentation() or not len(boxes):
        return boxes, np.ones(len(boxes), bool)
    class_id, x, y, w, h = boxes.T
    if augmentation.flip:
        x = width - x
    zoom = augmentation.zoom
    x0 = np.clip((x - w / 2) * zoom + augmentation.left, 0, width)
    x1 = np.clip((x + w / 2) * zoom + augmentation.left, 0, width)
    y0 = np.clip((y - h / 2) * zoom + augmentation.top, 0, height)
    y1 = np.clip((y + h / 2) * zoom + augmentation.top, 0, height)
    columns = (class_id, (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0)
    out = np.stack(columns, axis=1).astype(np.float32)
    return out, (out[:, 3] >= MIN_VISIBLE) & (out[:, 4] >= MIN_VISIBLE)
