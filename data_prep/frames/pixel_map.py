"""Frames through a map of pixels, with lost and added events: what augmentations do on a CPU.

All of it is integer arithmetic, so that a GPU gets the same frames (pipeline/data/expand.py).
"""

from typing import Any, NamedTuple

import numpy as np
from evspan.data_prep.frames.codec import AGAIN, SKIP, STEP
from numba import njit
from numpy.typing import NDArray

FRACTION_BITS = 32  # of the coefficients of an affine map
DROP_ONE = 1 << 16  # `drop` that loses every event
HASH_MASK = 0xFFFFFFFF


def hash32(x: Any) -> Any:
    """Mixes numbers of 32 bits: a permutation whose values look random.

    The factors have 31 bits, so no product overflows int64.

    Args:
        x: integers from 0 to 2^32 - 1: an int, or an int64 array or tensor.

    Returns:
        The same kind, from 0 to 2^32 - 1.

    Source: "triple32" family of C. Wellons' hash-prospector, the two-round hash of lowest bias.
    """
    x = x ^ (x >> 16)
    x = (x * 0x21F0AAAD) & HASH_MASK
    x = x ^ (x >> 15)
    x = (x * 0x735A2D97) & HASH_MASK
    return x ^ (x >> 15)


_hash32 = njit(cache=True, nogil=True, inline="always")(hash32)


class PixelTargets(NamedTuple):
    """The pixels of the result that show each pixel of a frame.

    start: (P + 1,) int32. Pixel i is shown by targets[start[i]:start[i + 1]].
    targets: (n,) int32.
    """

    start: NDArray[np.int32]
    targets: NDArray[np.int32]


@njit(cache=True, nogil=True)
def affine_source(coefficients: NDArray[np.int64], height: int, width: int) -> NDArray[np.int32]:
    """The source pixel of each pixel of the result, for an affine map.

    Args:
        coefficients: (6,) xx, xy, x0, yx, yy, y0 with FRACTION_BITS bits after the point: pixel
            (y, x) shows column xx * x + xy * y + x0 and row yx * x + yy * y + y0, rounded down.
        height, width: of the frame and of the result, in pixels.

    Returns:
        (height, width) row * width + column of the source; -1: it is outside.
    """
    source = np.empty((height, width), np.int32)
    xx, xy, x0, yx, yy, y0 = coefficients
    for y in range(height):
        column = xy * y + x0
        row = yy * y + y0
        for x in range(width):
            from_x = column >> FRACTION_BITS
            from_y = row >> FRACTION_BITS
            inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
            source[y, x] = from_y * width + from_x if inside else -1
            column += xx
            row += yx
    return source


@njit(cache=True, nogil=True)
def _invert(source: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    # start[i + 2] counts, then is where pixel i's next target goes, which ends at start[i + 1].
    start = np.zeros(source.size + 2, np.int32)
    for target in range(source.size):
        start[source[target] + 2] += 1
    start[1] = 0  # those that show nothing
    for pixel in range(2, start.size):
        start[pixel] += start[pixel - 1]
    targets = np.empty(source.size, np.int32)
    for target in range(source.size):
        pixel = source[target]
        if pixel >= 0:
            targets[start[pixel + 1]] = target
            start[pixel + 1] += 1
    return start[:-1], targets


def pixel_targets(source: NDArray[np.int32]) -> PixelTargets:
    """Inverts a map of pixels.

    Args:
        source: (H, W) the pixel that each pixel of the result shows; -1: none.
    """
    return PixelTargets(*_invert(source.reshape(-1)))


@njit(cache=True, nogil=True)
def _decode_mapped(
    code: NDArray[np.uint8],
    start: NDArray[np.int32],
    targets: NDArray[np.int32],
    plane: int,
    key: int,
    drop: int,
    out: NDArray[np.uint8],
) -> None:
    """Decodes a frame through a map; see `decode_mapped`.

    Args:
        plane: of `out`, which gets the first plane of the frame; after the last one comes plane 0.
        key: of the frame's hash.
        out: (C, H * W) zeros.
    """
    pixels = start.size - 1
    pixel = np.int64(-1)
    for i in range(code.size):
        byte = code[i]
        if byte != AGAIN:
            pixel += np.int64(STEP) if byte == SKIP else np.int64(byte) + 1
            while pixel >= pixels:
                pixel -= pixels
                plane += 1
                if plane == out.shape[0]:
                    plane = 0
            if byte == SKIP:
                continue
        if drop and _hash32(np.int64(key + i)) >> 16 < drop:
            continue
        for k in range(start[pixel], start[pixel + 1]):
            out[plane, targets[k]] += 1


def decode_mapped(
    code: NDArray[np.uint8],
    start: NDArray[np.int64],
    pixels: PixelTargets,
    out: NDArray[np.uint8],
    *,
    swap_polarity: bool,
    drop: int,
    keys: NDArray[np.int64],
) -> None:
    """Decodes frames into the places that a map of pixels gives their events.

    Args:
        code, start: as in `codec.decode_frames`, and checked by `codec.measure_frames`.
        out: (n, C, H, W) zeros; each frame is C-contiguous.
        swap_polarity: the first half of the channels goes to the second, and vice versa.
        drop: in 65536ths, the fraction of the events to lose. Byte i of a frame's code is lost if
            hash32(key + i) >> 16 is below it.
        keys: (n,) of each frame, below 2^31.
    """
    channels = out.shape[1]
    plane = channels // 2 if swap_polarity else 0
    for i, frame in enumerate(out):
        _decode_mapped(
            code[start[i] : start[i + 1]],
            pixels.start,
            pixels.targets,
            plane,
            int(keys[i]),
            drop,
            frame.reshape(channels, -1),
        )


@njit(cache=True, nogil=True)
def add_noise(cells: NDArray[np.uint8], key: int, count: int) -> None:
    """Gives at least one event to random cells of a frame.

    These are the cells hash32(key + i) * n / 2^32 for i = 0, ..., count - 1.

    Args:
        cells: (n,) the frame.
        key: below 2^31.
    """
    for i in range(count):
        cell = (_hash32(np.int64(key + i)) * cells.size) >> 32
        if cells[cell] == 0:
            cells[cell] = 1
