"""Augmentations, drawn once per lane and sequence and applied alike to its frames and boxes.

Frames: events are lost (`drop`), polarities swapped, pixels moved in one nearest-neighbour
resampling (flip, rotation, shear, zoom, translation; erased patches show nothing), and then events
are added (noise, hot pixels), which belong to the sensor and not to the scene.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from evspan.conf.schema.training import AugmentationConfig
from evspan.data_prep.frames.codec import decode_into, decode_moved, gather_cells
from evspan.data_prep.frames.pixel_map import (
    DROP_ONE,
    FRACTION_BITS,
    HASH_MASK,
    add_noise,
    affine_source,
    decode_mapped,
    hash32,
    pixel_targets,
)
from evspan.pipeline.data.datasets import FrameCodes, encode_frames
from evspan.pipeline.data.plan import Chunk, generator
from numpy.typing import NDArray

MIN_VISIBLE = 1.0  # pixels per side; a box of which less is visible is dropped
DROPPED = 1  # names of random numbers per frame
NOISE = 2

Patch = tuple[int, int, int, int]  # top, left, bottom, right, in pixels


@dataclass(frozen=True)
class Augmentation:
    """What is done to the frames of one sequence.

    A point p of the input, in pixels from the top left, goes to zoom * (c + R S (p - c)) + (left,
    top): c is the centre of the frame, S the shear, R the rotation. With `flip` the input is
    mirrored first.

    Attributes:
        top, left: in pixels.
        rotation: degrees, clockwise.
        shear: degrees; x grows by y * tan(shear).
        patches: rectangles of the result that show nothing.
        polarity_flip: ON events become OFF events, and vice versa.
        drop: in 65536ths, the fraction of the events that is lost.
        noise: random cells per frame that get an event.
        hot: pixels with an event in every bin of one polarity: polarity * H * W + pixel.
        key: 32 bits, names the random numbers of `drop` and `noise`.
    """

    flip: bool = False
    zoom: float = 1.0
    top: float = 0.0
    left: float = 0.0
    rotation: float = 0.0
    shear: float = 0.0
    patches: tuple[Patch, ...] = ()
    polarity_flip: bool = False
    drop: int = 0
    noise: int = 0
    hot: tuple[int, ...] = ()
    key: int = 0

    @property
    def moves_rows_and_columns(self) -> bool:
        """Whether rows move independently of columns."""
        return self.rotation == 0 and self.shear == 0

    @property
    def moves(self) -> bool:
        """Whether any pixel shows another one."""
        still = (False, 1.0, 0.0, 0.0, 0.0, 0.0)
        return (self.flip, self.zoom, self.top, self.left, self.rotation, self.shear) != still

    @property
    def changes_events(self) -> bool:
        """Whether it does more than to move rows and columns, before events are added."""
        changes = bool(self.patches) or self.polarity_flip or self.drop > 0
        return changes or not self.moves_rows_and_columns

    @property
    def adds_events(self) -> bool:
        """Whether it has noise or hot pixels."""
        return self.noise > 0 or bool(self.hot)

    def frame_keys(self, name: int, frames: NDArray[np.int64]) -> NDArray[np.int64]:
        """The keys of the random numbers of frames, below 2^31: a pure function of the frame.

        Args:
            name: DROPPED or NOISE.
            frames: (n,) positions in the recording.
        """
        sequence = hash32((self.key + name) & HASH_MASK)
        keys: NDArray[np.int64] = hash32((sequence + frames) & HASH_MASK) >> 1
        return keys

    def summary(self) -> str:
        """What it does, in a few words."""
        parts = {
            "flip": self.flip,
            f"zoom {self.zoom:.2f}": self.zoom != 1,
            f"rotation {self.rotation:+.0f} deg": self.rotation != 0,
            f"shear {self.shear:+.0f} deg": self.shear != 0,
            f"moved {self.left:+.0f}, {self.top:+.0f} px": (self.top, self.left) != (0, 0),
            "polarity flip": self.polarity_flip,
            f"{self.drop / DROP_ONE:.0%} of events lost": self.drop > 0,
            f"{self.noise} noise events": self.noise > 0,
            f"{len(self.hot)} hot pixels": bool(self.hot),
            f"{len(self.patches)} erased": bool(self.patches),
        }
        return ", ".join(part for part, shown in parts.items() if shown) or "as stored"


# -- drawing ---------------------------------------------------------------------------------------
def draw_augmentation(
    config: AugmentationConfig,
    chunk: Chunk,
    *,
    seed: int,
    height: int,
    width: int,
    frame_us: int = 50_000,
) -> Augmentation:
    """Draws the augmentation of a chunk's sequence.

    Streamed lanes only zoom out: zooming in would lose objects that the carried state has seen. For
    the same reason nothing is erased there, where a patch would cover a whole recording. The rest
    moves objects over the border as a camera does, once, for the whole sequence.

    Args:
        chunk: names the sequence; all chunks of a sequence give the same augmentation.
        seed: of the run.
        height, width: of the frames, in pixels.
        frame_us: time span of a frame.
    """
    # The first six numbers alone decide about flip and zoom, and each value has its own: what is
    # drawn for one does not depend on the config of the others.
    numbers = generator(seed, 2, int(chunk.streamed), *chunk.draw).random(21).tolist()
    flip, zooms, inwards, amount, v, u, *more = numbers
    zoom = 1.0
    if zooms < config.zoom_prob:
        zoom = 1 + amount * (config.zoom_in - 1)
        if chunk.streamed or inwards >= config.zoom_in_fraction:
            zoom = 1 / (1 + amount * (config.zoom_out - 1))
    rotates, rotation, shears, shear, translates, down, right = more[:7]
    swaps, drops, drop, noisy, noise, heats, erases = more[7:14]
    down = _drawn(translates, config.translate_prob, 2 * down - 1, config.translate_fraction)
    right = _drawn(translates, config.translate_prob, 2 * right - 1, config.translate_fraction)
    drop = _drawn(drops, config.drop_prob, drop, config.drop_fraction)
    rate = _drawn(noisy, config.noise_prob, noise, config.noise_hz)
    pixels = height * width
    patches: tuple[Patch, ...] = ()
    if erases < config.erase_prob and not chunk.streamed:
        rng = generator(seed, 3, int(chunk.streamed), *chunk.draw)
        patches = draw_patches(config, rng, height, width)
    hot: tuple[int, ...] = ()
    if heats < config.hot_prob:
        rng = generator(seed, 4, int(chunk.streamed), *chunk.draw)
        hot = hot_pixels(int(rng.integers(config.hot_pixels + 1)), rng, pixels)
    return Augmentation(
        flip=bool(flip < config.hflip_prob),
        zoom=zoom,
        top=float(v * height * (1 - zoom)) + height * down,
        left=float(u * width * (1 - zoom)) + width * right,
        rotation=_drawn(rotates, config.rotate_prob, 2 * rotation - 1, config.rotate_degrees),
        shear=_drawn(shears, config.shear_prob, 2 * shear - 1, config.shear_degrees),
        patches=patches,
        polarity_flip=bool(swaps < config.polarity_flip_prob),
        drop=round(drop * DROP_ONE),
        noise=noise_events(rate, pixels, frame_us),
        hot=hot,
        key=int(more[14] * HASH_MASK),
    )


def _drawn(chance: float, probability: float, amount: float, most: float) -> float:
    return amount * most if chance < probability else 0.0


def draw_patches(
    config: AugmentationConfig, rng: np.random.Generator, height: int, width: int
) -> tuple[Patch, ...]:
    """Draws rectangles within the frame, 1/3 to 3 times as wide as high.

    Args:
        config: their number and size at most.
        height, width: of the frames, in pixels.
    """
    patches = []
    for _ in range(rng.integers(config.erase_patches) + 1):
        fraction, shape, v, u = rng.random(4).tolist()
        area = fraction * config.erase_area * height * width
        aspect = 3 ** (2 * shape - 1)
        high = min(height, round(math.sqrt(area / aspect)))
        wide = min(width, round(math.sqrt(area * aspect)))
        top = round(v * (height - high))
        left = round(u * (width - wide))
        patches.append((top, left, top + high, left + wide))
    return tuple(patches)


def hot_pixels(number: int, rng: np.random.Generator, pixels: int) -> tuple[int, ...]:
    """Draws `Augmentation.hot`.

    Args:
        pixels: of a frame.
    """
    return tuple(rng.integers(2 * pixels, size=number).tolist())


def noise_events(rate_hz: float, pixels: int, frame_us: int) -> int:
    """Events per frame, at a rate per pixel and second."""
    return round(rate_hz * pixels * frame_us / 1e6)


# -- frames ----------------------------------------------------------------------------------------
def augment_frames(
    frames: NDArray[np.uint8], augmentation: Augmentation, out: NDArray[np.uint8], first: int = 0
) -> None:
    """Writes the augmented frames: nearest pixel, zero outside.

    Args:
        frames: (T, C, H, W).
        out: the same shape, zeros. Each frame of both is contiguous.
        first: position of the first frame in its recording.
    """
    if augmentation.changes_events:
        decode_augmented(encode_frames(frames), augmentation, out, first)
        return
    if not augmentation.moves:
        out[:] = frames
    else:
        rows, columns = source_maps(augmentation, *frames.shape[2:])
        for frame, augmented in zip(frames, out, strict=True):
            gather_cells(frame, rows, columns, augmented)
    _add_events(augmentation, out, first)


def decode_augmented(
    frames: FrameCodes, augmentation: Augmentation, out: NDArray[np.uint8], first: int = 0
) -> None:
    """Writes the augmented frames as `augment_frames` does.

    Args:
        frames: n frames.
        out: (n, C, H, W) zeros. Each frame is contiguous.
        first: position of the first frame in its recording.
    """
    height, width = out.shape[2:]
    if augmentation.changes_events:
        decode_mapped(
            frames.code,
            frames.start,
            pixel_targets(source_pixels(augmentation, height, width)),
            out,
            swap_polarity=augmentation.polarity_flip,
            drop=augmentation.drop,
            keys=augmentation.frame_keys(DROPPED, first + np.arange(len(out))),
        )
    elif augmentation.moves:
        rows, columns = source_maps(augmentation, height, width)
        decode_moved(frames.code, frames.start, rows, columns, out)
    else:
        decode_into(frames.code, frames.start, out)
    _add_events(augmentation, out, first)


def _add_events(augmentation: Augmentation, out: NDArray[np.uint8], first: int) -> None:
    """Adds noise and hot pixels to frames (n, C, H, W)."""
    if not augmentation.adds_events:
        return
    keys = augmentation.frame_keys(NOISE, first + np.arange(len(out)))
    hot = hot_cells(augmentation, out.shape[1:])
    for frame, key in zip(out, keys.tolist(), strict=True):
        cells = frame.reshape(-1)
        add_noise(cells, key, augmentation.noise)
        cells[hot] = np.maximum(cells[hot], 1)


def hot_cells(augmentation: Augmentation, shape: Sequence[int]) -> NDArray[np.int64]:
    """The cells of a frame in which its hot pixels have an event.

    Args:
        shape: of a frame: C, H, W.

    Returns:
        (n,) positions in the frame.
    """
    channels, height, width = shape
    pixels = height * width
    bins = channels // 2
    polarity, pixel = np.divmod(np.array(augmentation.hot, np.int64), pixels)
    first = polarity * bins * pixels + pixel
    return (first[:, None] + np.arange(bins) * pixels).reshape(-1)


# -- maps of pixels --------------------------------------------------------------------------------
def source_maps(
    augmentation: Augmentation, height: int, width: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The input row of each output row (H,), and the same for columns (W,); -1: none.

    Of zoom, translation and flip alone.
    """
    rows = _source_pixels(height, augmentation.top, augmentation.zoom)
    columns = _source_pixels(width, augmentation.left, augmentation.zoom)
    if augmentation.flip:
        columns = np.where(columns < 0, -1, width - 1 - columns)
    return rows, columns


def _source_pixels(size: int, offset: float, zoom: float) -> NDArray[np.int64]:
    """(size,) the input pixel that each output pixel shows; -1: none."""
    source = np.floor((np.arange(size) + 0.5 - offset) / zoom).astype(np.int64)
    return np.where((source >= 0) & (source < size), source, -1)


def source_pixels(augmentation: Augmentation, height: int, width: int) -> NDArray[np.int32]:
    """(H, W) the input pixel, row * W + column, that each output pixel shows; -1: none."""
    if augmentation.moves_rows_and_columns:
        rows, columns = source_maps(augmentation, height, width)
        source = (rows[:, None] * width + columns).astype(np.int32)
        source[rows < 0] = -1
        source[:, columns < 0] = -1
    else:
        source = affine_source(affine_coefficients(augmentation, height, width), height, width)
    for top, left, bottom, right in augmentation.patches:
        source[top:bottom, left:right] = -1
    return source


def affine_coefficients(augmentation: Augmentation, height: int, width: int) -> NDArray[np.int64]:
    """(6,) the map from pixels of the result to pixels of the input; see `affine_source`.

    Rounded to 2^-32 pixel here, once: what follows is integer arithmetic, alike on every device.
    """
    matrix, offset = _forward_map(augmentation, height, width)
    inverse = np.linalg.inv(matrix)
    at_first_pixel = inverse @ (np.array((0.5, 0.5)) - offset)  # its centre
    if augmentation.flip:
        inverse[0] = -inverse[0]
        at_first_pixel[0] = width - at_first_pixel[0]
    values = np.column_stack((inverse, at_first_pixel))
    scaled = np.floor(values * float(1 << FRACTION_BITS) + 0.5)
    return scaled.astype(np.int64).reshape(-1)


def _forward_map(
    augmentation: Augmentation, height: int, width: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Matrix (2, 2) and offset (2,) that move points x, y of the (mirrored) input."""
    angle = math.radians(augmentation.rotation)
    rotation = np.array(
        ((math.cos(angle), -math.sin(angle)), (math.sin(angle), math.cos(angle))), np.float64
    )
    shear = np.array(((1, math.tan(math.radians(augmentation.shear))), (0, 1)), np.float64)
    turn = rotation @ shear
    center = np.array((width / 2, height / 2))
    shift = np.array((augmentation.left, augmentation.top))
    return augmentation.zoom * turn, augmentation.zoom * (center - turn @ center) + shift


# -- boxes -----------------------------------------------------------------------------------------
def augment_boxes(
    boxes: NDArray[np.float32],
    augmentation: Augmentation,
    *,
    height: int,
    width: int,
    min_visible: float = 0.0,
) -> NDArray[np.float32]:
    """Augments boxes and cuts them at the frame's border.

    A turned box becomes the upright one around its corners.

    Args:
        boxes: (n, 5) class, cx, cy, w, h in pixels. Class -1 marks an ignore region.
        height, width: of the frames, in pixels.
        min_visible: boxes of which a smaller fraction is left are dropped, but ignore regions are
            kept.

    Returns:
        (m, 5), without boxes of which less than MIN_VISIBLE pixels per side are left.
    """
    moved, visible = _move_boxes(boxes, augmentation, height, width, min_visible)
    return moved[visible]


def augment_box_rows(
    boxes: NDArray[np.float32],
    counts: NDArray[np.int64],
    augmentation: Augmentation,
    *,
    height: int,
    width: int,
    min_visible: float = 0.0,
) -> list[NDArray[np.float32]]:
    """`augment_boxes` of several frames at once.

    Args:
        boxes: (n, 5) of all frames, one frame after the other.
        counts: (T,) how many boxes each frame has.
        height, width, min_visible: as there.

    Returns:
        Of each frame what is left, (m, 5).
    """
    moved, visible = _move_boxes(boxes, augmentation, height, width, min_visible)
    kept_before = np.concatenate(([0], np.cumsum(visible)))
    starts = kept_before[np.concatenate(([0], np.cumsum(counts)))].tolist()
    kept = moved[visible]
    return [kept[first:last] for first, last in pairwise(starts)]


def _move_boxes(
    boxes: NDArray[np.float32],
    augmentation: Augmentation,
    height: int,
    width: int,
    min_visible: float,
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The augmented boxes (n, 5), and which of them are visible (n,)."""
    if not augmentation.moves or not len(boxes):
        return boxes, np.ones(len(boxes), bool)
    class_id, x, y, w, h = boxes.T
    if augmentation.flip:
        x = width - x
    if augmentation.moves_rows_and_columns:
        zoom = np.float64(augmentation.zoom)  # what follows is in double precision
        x0 = (x - w / 2) * zoom + augmentation.left
        x1 = (x + w / 2) * zoom + augmentation.left
        y0 = (y - h / 2) * zoom + augmentation.top
        y1 = (y + h / 2) * zoom + augmentation.top
    else:
        matrix, offset = _forward_map(augmentation, height, width)
        center = matrix @ np.stack((x, y)).astype(np.float64) + offset[:, None]
        # The corners of a parallelogram reach as far as the sum of its half sides.
        half_w, half_h = np.abs(matrix) @ np.stack((w, h)).astype(np.float64) / 2
        x0 = center[0] - half_w
        x1 = center[0] + half_w
        y0 = center[1] - half_h
        y1 = center[1] + half_h
    area = (x1 - x0) * (y1 - y0) if min_visible > 0 else None
    x0 = np.clip(x0, 0, width)
    x1 = np.clip(x1, 0, width)
    y0 = np.clip(y0, 0, height)
    y1 = np.clip(y1, 0, height)
    columns = (class_id, (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0)
    out = np.stack(columns, axis=1).astype(np.float32)
    visible = (out[:, 3] >= MIN_VISIBLE) & (out[:, 4] >= MIN_VISIBLE)
    if area is not None:
        enough = out[:, 3] * out[:, 4] >= min_visible * area
        visible &= enough | (class_id < 0)
    return out, visible
