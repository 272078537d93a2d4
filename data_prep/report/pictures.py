"""Stored frames with their boxes as small PNG files."""

import io
from typing import NamedTuple

import h5py
import numpy as np
from evspan.data_prep.draw import RGB, draw_boxes, draw_label, frame_to_rgb
from evspan.data_prep.shards.format import RecordingEntry, read_frames
from numpy.typing import NDArray
from PIL import Image

WIDEST = 700  # pixels


class Picture(NamedTuple):
    png: bytes
    about: str


def draw_picture(group: h5py.Group, entry: RecordingEntry, classes: list[str], i: int) -> Picture:
    frame, (first, last) = read_frames(group, i, i + 1)[0], group["box_start"][i : i + 2].tolist()
    boxes = group["boxes"][first:last]
    by = -(-frame.shape[2] // WIDEST)
    corners = (
        np.stack((boxes["x"], boxes["y"], boxes["x"] + boxes["w"], boxes["y"] + boxes["h"]), 1) / by
    )
    rgb = draw_boxes(
        frame_to_rgb(_smaller(frame, by)),
        corners,
        [classes[k] for k in boxes["class_id"]],
        upscale=2 if frame.shape[2] < WIDEST / 2 else 1,
    )
    second = (int(group["end_us"][i]) - entry.first_us) / 1e6
    count = (
        "not labelled"
        if not group["labelled"][i]
        else f"{len(boxes)} box{'es' if len(boxes) != 1 else ''}"
    )
    return Picture(
        _png(draw_label(rgb, f"{second:.2f} s")),
        f"{entry.split}/{entry.name}, {second:.2f} s, {count}",
    )


def _smaller(frame: NDArray[np.uint8], by: int) -> NDArray[np.uint8]:
    """Blocks of pixels added up, so that lone events stay to be seen."""
    height, width = frame.shape[1] // by, frame.shape[2] // by
    blocks = frame[:, : height * by, : width * by].reshape(-1, height, by, width, by)
    return frame if by == 1 else blocks.sum((2, 4), dtype=np.int64).clip(max=255).astype(np.uint8)


def _png(rgb: RGB) -> bytes:
    out = io.BytesIO()
    Image.fromarray(rgb).quantize(
        64, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
    ).save(out, "PNG", optimize=True)
    return out.getvalue()
