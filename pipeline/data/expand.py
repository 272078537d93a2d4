"""Encoded frames -> dense frames with torch operators: on any device, without host waits.

The values are those of `decode_frames` (data_prep/frames/codec.py) and `augment_frames`, bit for
bit.
"""

import torch
from evspan.data_prep.frames.codec import AGAIN, SKIP, STEP
from torch import Tensor

Shape = tuple[int, int, int, int, int]  # frames, lanes, channels, height, width


def expand_frames(
    code: Tensor, first: Tensor, jump: Tensor, shape: Shape, source: Tensor | None = None
) -> Tensor:
    """Decodes the frames of T x B places, and remaps their pixels.

    All codes are decoded at once: the cell of a byte is the sum of what the bytes up to it advance,
    where the first byte of a frame also leads from the end of the frame before to its own place.
    The codes must be checked before (`data_prep.frames.codec.measure_frames`): bytes that are no
    code of such frames write outside of the result.

    Args:
        code: (K,) uint8, the codes of the frames that have events, one after the other.
        first: (n,) int64, index of the first byte of each of these frames.
        jump: (n,) int64, added to the sum at each first byte (`data.encoded.encode_lanes`).
        shape: T, B, C, H, W.
        source: as in `remap_pixels`; None: pixels stay where they are.

    Returns:
        (T, B, C, H, W) uint8; places without a frame are zero.
    """
    frames, lanes, channels, height, width = shape
    pixels = height * width
    cell = _steps(code).index_add_(0, first, jump).cumsum_(0)
    plane_cells = pixels
    if source is not None:
        # One cell more per plane, which stays zero: the source of pixels that show nothing.
        plane_cells += 1
        cell.add_(cell.div(pixels, rounding_mode="floor"))
    planes = code.new_zeros(frames * lanes * channels * plane_cells)
    planes.scatter_add_(0, cell, code.ne(SKIP).view(torch.uint8))
    if source is not None:
        planes = remap_pixels(planes.view(frames, lanes, channels, plane_cells), source)
    return planes.view(shape)


def remap_pixels(planes: Tensor, source: Tensor) -> Tensor:
    """Moves the pixels of every lane.

    Args:
        planes: (T, B, C, H * W + 1), zero in the last cell of each plane.
        source: (B, H * W) int64, the pixel that each pixel of the result shows; H * W: none.

    Returns:
        (T, B, C, H * W)
    """
    frames, lanes, channels, _ = planes.shape
    index = source.view(1, lanes, 1, -1).expand(frames, lanes, channels, -1)
    return planes.gather(3, index)


def source_pixels(rows: Tensor, columns: Tensor) -> Tensor:
    """The `source` of `remap_pixels` where rows and columns move independently.

    Args:
        rows: (B, H) int64, first pixel of the source row; H * W: none.
        columns: (B, W) int64, source column; H * W: none.

    Returns:
        (B, H * W) int64
    """
    nothing = rows.shape[1] * columns.shape[1]
    source = rows.unsqueeze(2) + columns.unsqueeze(1)
    return source.clamp_(max=nothing).flatten(1)


def _steps(code: Tensor) -> Tensor:
    """(K,) int64, the cells that each byte advances."""
    # AGAIN + 1 becomes 0. SKIP + 1 overflows, and is replaced.
    step = code.add(1).remainder_(AGAIN + 1).masked_fill_(code.eq(SKIP), STEP)
    return step.long()
