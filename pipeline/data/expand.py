"""Encoded frames -> dense frames with torch operators: on any device, without host waits.

The values are those of `decode_frames` (data_prep/frames/codec.py) and `augment_frames`, bit for
bit: whatever depends on the augmentation is computed in integers.
"""

import torch
from evspan.data_prep.frames.codec import AGAIN, SKIP, STEP
from evspan.data_prep.frames.pixel_map import FRACTION_BITS, HASH_MASK, hash32
from torch import Tensor

Shape = tuple[int, int, int, int, int]  # frames, lanes, channels, height, width


def expand_frames(
    code: Tensor,
    first: Tensor,
    jump: Tensor,
    shape: Shape,
    source: Tensor | None = None,
    thin: Tensor | None = None,
) -> Tensor:
    """Decodes the frames of T x B places, and remaps their pixels.

    All codes are decoded at once: the cell of a byte is the sum of what the bytes up to it advance,
    where the first byte of a frame also leads from the end of the frame before to its own place.
    The codes must be checked before (`data_prep.frames.codec.measure_frames`): bytes that are no
    code of such frames write outside of the result.

    Args:
        code: (K,) uint8, the codes of the frames that have events, one after the other.
        first: (n,) int64, index of the first byte of each of these frames. Where polarities are
            swapped, also of the first byte in the second half of a frame's channels.
        jump: (n,) int64, added to the sum at each first byte (`data.encoded.encode_lanes`).
        shape: T, B, C, H, W.
        source: as in `remap_pixels`; None: pixels stay where they are.
        thin: as in `kept_events`; None: all events are kept.

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
    events = code.ne(SKIP)
    if thin is not None:
        events.logical_and_(kept_events(code, first[: len(thin)], thin))
    planes.scatter_add_(0, cell, events.view(torch.uint8))
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


def affine_source(coefficients: Tensor, height: int, width: int) -> Tensor:
    """The `source` of `remap_pixels` for affine maps.

    Args:
        coefficients: (n, 6) int64, of n lanes, as in data_prep/frames/pixel_map.py.
        height, width: of the frames.

    Returns:
        (n, H * W) int64
    """
    device = coefficients.device
    xx, xy, x0, yx, yy, y0 = coefficients.view(-1, 6, 1, 1).unbind(1)
    x = torch.arange(width, device=device)
    y = torch.arange(height, device=device).unsqueeze(1)
    column = ((xx * x) + (xy * y + x0)).bitwise_right_shift_(FRACTION_BITS)
    row = ((yx * x) + (yy * y + y0)).bitwise_right_shift_(FRACTION_BITS)
    # Clamped pixels are outside: clamping changes them.
    outside = column.clamp(0, width - 1).ne(column)
    outside.logical_or_(row.clamp(0, height - 1).ne(row))
    source = row.mul_(width).add_(column).masked_fill_(outside, height * width)
    return source.flatten(1)


def erase_patches(source: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Lets the pixels of erased patches show nothing, in place.

    Args:
        source: (B, H * W) as in `remap_pixels`.
        rows, columns: (B, H) and (B, W) int64. Bit i of both is set where patch i is.
    """
    erased = rows.unsqueeze(2).bitwise_and(columns.unsqueeze(1)).ne(0)
    return source.masked_fill_(erased.flatten(1), source.shape[1])


def kept_events(code: Tensor, first: Tensor, thin: Tensor) -> Tensor:
    """Which bytes of the codes keep their event, where a fraction of the events is lost.

    The sum of `thin` and of 1 for every byte counts, at byte i of a frame, to the frame's key + i
    (the lower 32 bits), and holds its `drop` above them (`pixel_map.decode_mapped`).

    Args:
        code: (K,) uint8.
        first: (n,) int64, index of the first byte of each frame with events.
        thin: (n,) int64, added to the sum at each first byte (`data.encoded.encode_lanes`).

    Returns:
        (K,) bool
    """
    counter = torch.ones_like(code, dtype=torch.int64).index_add_(0, first, thin).cumsum_(0)
    drop = counter.bitwise_right_shift(32)
    number: Tensor = hash32(counter.bitwise_and_(HASH_MASK))
    return number.bitwise_right_shift_(16).ge(drop)


def noise_cells(keys: Tensor, counts: Tensor, begins: Tensor, index: Tensor, cells: int) -> Tensor:
    """The cells that get noise, as `pixel_map.add_noise` chooses them.

    Args:
        keys: (n,) int64 of each frame with noise.
        counts: (n,) int64, how many cells of each frame, at least 1.
        begins: (n,) int64, where each frame begins.
        index: (m,) int64, 0, 1, ... to the highest count. Frames with fewer repeat theirs.
        cells: of a frame.

    Returns:
        (n * m,) int64
    """
    number = index.remainder(counts.unsqueeze(1)).add_(keys.unsqueeze(1))
    random: Tensor = hash32(number)
    cell = random.mul_(cells).bitwise_right_shift_(32)
    return cell.add_(begins.unsqueeze(1)).flatten()


def fill_cells(frames: Tensor, cells: Tensor) -> None:
    """Gives at least one event to cells of frames, in place.

    Args:
        frames: uint8, contiguous.
        cells: (n,) int64, positions in `frames`. The same one may occur several times.
    """
    flat = frames.view(-1)
    flat.scatter_(0, cells, flat.gather(0, cells).clamp_(min=1))


def _steps(code: Tensor) -> Tensor:
    """(K,) int64, the cells that each byte advances."""
    # AGAIN + 1 becomes 0. SKIP + 1 overflows, and is replaced.
    step = code.add(1).remainder_(AGAIN + 1).masked_fill_(code.eq(SKIP), STEP)
    return step.long()
