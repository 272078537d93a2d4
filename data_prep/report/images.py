"""Stored frames with their boxes as small PNG images for the report page."""

import io
from base64 import b64encode
from typing import NamedTuple

import h5py
import numpy as np
from evspan.data_prep.draw import RGB, box_corners, draw_boxes, draw_label, frame_to_rgb
from evspan.data_prep.shards.format import RecordingEntry
from evspan.data_prep.shards.reading import read_frames, read_stored_boxes
from numpy.typing import NDArray
from PIL import Image

MAX_WIDTH = 700  # pixels; wider frames are drawn smaller
COLOURS = 64


class FrameImage(NamedTuple):
    """A PNG file and its caption."""

    png: bytes
    caption: str

    @property
    def data_uri(self) -> str:
        """The image as the `src` of an HTML image."""
        return f"data:image/png;base64,{b64encode(self.png).decode()}"


def draw_frame_image(
    group: h5py.Group, entry: RecordingEntry, classes: list[str], index: int
) -> FrameImage:
    """Draws frame `index` of a recording with its boxes and its time."""
    frame = read_frames(group, index, index + 1)[0]
    boxes = read_stored_boxes(group, index, index + 1)
    width = frame.shape[2]
    factor = -(-width // MAX_WIDTH)
    rgb = draw_boxes(
        frame_to_rgb(_reduced(frame, factor)),
        box_corners(boxes) / factor,
        [classes[class_id] for class_id in boxes["class_id"]],
        upscale=2 if width < MAX_WIDTH / 2 else 1,
    )
    seconds = (int(group["end_us"][index]) - entry.first_us) / 1e6
    if not group["labelled"][index]:
        label = "not labelled"
    elif len(boxes) == 1:
        label = "1 box"
    else:
        label = f"{len(boxes)} boxes"
    return FrameImage(
        _png(draw_label(rgb, f"{seconds:.2f} s")),
        f"{entry.split}/{entry.name}, {seconds:.2f} s, {label}",
    )


def _reduced(frame: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """(channels, H, W) -> (channels, H // factor, W // factor); sums the pixels of a block.

    A sum keeps single events visible.
    """
    if factor == 1:
        return frame
    height = frame.shape[1] // factor
    width = frame.shape[2] // factor
    whole_blocks = frame[:, : height * factor, : width * factor]
    blocks = whole_blocks.reshape(-1, height, factor, width, factor)
    sums: NDArray[np.int64] = blocks.sum((2, 4), dtype=np.int64)
    return np.minimum(sums, 255).astype(np.uint8)


def _png(rgb: RGB) -> bytes:
    image = Image.fromarray(rgb).quantize(
        COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE
    )
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()
