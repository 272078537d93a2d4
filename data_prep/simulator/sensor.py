"""Rendering and the pixels of an event camera, as numba kernels.

A pixel fires when its log intensity has moved by its threshold from the level of its last event;
crossing times are interpolated linearly between two renderings (ESIM: Rebecq, Gehrig & Scaramuzza,
CoRL 2018). Pixel x covers [x, x + 1). After an event a pixel does not fire for the refractory
period: events in it are lost, while the level still moves.
An event is packed into one int64, `t << 23 | y << 12 | x << 1 | p`: to sort the numbers is to sort
the events.

Arrays that several kernels take: `shapes` (K, columns) float32 and `centres` (K, 2) float32,
x and y in pixels, of K objects in painter's order; `background` and `canvas` (H, W) float32, log
intensity.
"""

import math

import numpy as np
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.simulator.config import SimulatorConfig
from evspan.data_prep.simulator.scene import (
    BALL,
    BOX,
    COS,
    EXTENT_X,
    EXTENT_Y,
    HALF_U,
    HALF_V,
    KIND,
    MEAN,
    PERIOD,
    PHASE,
    SIN,
    SWING,
)
from numba import njit
from numpy.typing import NDArray

LONG_AGO = -(1 << 40)  # us
BUFFER_EVENTS = 1 << 18

Floats = NDArray[np.float32]


@njit(cache=True, nogil=True, inline="always")
def _distance(shape: Floats, u: float, v: float) -> float:
    """Signed distance of a point to the outline, negative inside; u, v: in the shape's own axes."""
    distance: float
    if shape[KIND] == BALL:
        distance = math.sqrt(u * u + v * v) - shape[HALF_U]
    else:
        distance = max(abs(u) - shape[HALF_U], abs(v) - shape[HALF_V])
    return distance


@njit(cache=True, nogil=True, inline="always")
def _wave(position: float, period: float) -> float:
    """Square wave of -1 and 1 with flanks of two pixels."""
    phase = position / period
    phase -= math.floor(phase)
    return min(1.0, max(-1.0, (abs(phase - 0.5) - 0.25) * period))


@njit(cache=True, nogil=True, inline="always")
def _texture(shape: Floats, u: float, v: float) -> float:
    """Log intensity: rings on a ball, a checker on a box, stripes across a bar."""
    period = shape[PERIOD]
    phase = shape[PHASE]
    if shape[KIND] == BALL:
        pattern = _wave(math.sqrt(u * u + v * v) + phase, period)
    else:
        pattern = _wave(u + phase, period)
        if shape[KIND] == BOX:
            pattern *= _wave(v + phase, period)
    intensity: float = shape[MEAN] + shape[SWING] * pattern
    return intensity


@njit(cache=True, nogil=True, inline="always")
def _bounds(centre: float, extent: float, size: int) -> tuple[int, int]:
    """The pixels that an object, with its soft edge, can touch on one axis: [first, last)."""
    return max(0, math.floor(centre - extent - 1)), min(size, math.ceil(centre + extent + 1))


@njit(cache=True, nogil=True, inline="always")
def _swept_bounds(start: float, end: float, extent: float, size: int) -> tuple[int, int]:
    """The bounds of an object that moves from `start` to `end` on one axis."""
    first, last = _bounds(min(start, end), extent, size)
    _, last_at_end = _bounds(max(start, end), extent, size)
    return first, max(last, last_at_end)


@njit(cache=True, nogil=True)
def render(
    canvas: Floats,
    background: Floats,
    shapes: Floats,
    centres: Floats,
    y0: int,
    y1: int,
    x0: int,
    x1: int,
) -> None:
    """Renders canvas[y0:y1, x0:x1]: the background, then the objects, with edges 1 pixel soft."""
    for y in range(y0, y1):
        for x in range(x0, x1):
            canvas[y, x] = background[y, x]
    for k in range(shapes.shape[0]):
        shape = shapes[k]
        cx = centres[k, 0]
        cy = centres[k, 1]
        cos = shape[COS]
        sin = shape[SIN]
        left, right = _bounds(cx, shape[EXTENT_X], canvas.shape[1])
        top, bottom = _bounds(cy, shape[EXTENT_Y], canvas.shape[0])
        for y in range(max(top, y0), min(bottom, y1)):
            for x in range(max(left, x0), min(right, x1)):
                dx = x + np.float32(0.5) - cx
                dy = y + np.float32(0.5) - cy
                u = cos * dx + sin * dy
                v = cos * dy - sin * dx
                alpha = np.float32(0.5) - _distance(shape, u, v)
                if alpha > 0:
                    difference = _texture(shape, u, v) - canvas[y, x]
                    canvas[y, x] += min(np.float32(1), alpha) * difference


@njit(cache=True, nogil=True, inline="always")
def _append(out: NDArray[np.int64], n: int, t: int, x: int, y: int, p: int) -> NDArray[np.int64]:
    """Packs an event into out[n]; returns `out`, or where it was full a copy of twice its size."""
    if n == out.size:
        out = np.concatenate((out, np.empty_like(out)))
    out[n] = (np.int64(t) << 23) | (np.int64(y) << 12) | (np.int64(x) << 1) | p
    return out


@njit(cache=True, nogil=True)
def fire(
    out: NDArray[np.int64],
    times: NDArray[np.int64],
    shapes: Floats,
    centres: Floats,
    background: Floats,
    canvas: Floats,
    level: Floats,
    reference: Floats,
    threshold: Floats,
) -> tuple[NDArray[np.int64], int]:
    """Finds the threshold crossings of [times[0], times[-1]).

    Args:
        out: buffer for packed events; replaced by a larger one where they do not fit.
        times: (S + 1,) us, of the renderings.
        centres: (S + 1, K, 2).
        level: (H, W) log intensity as of the last rendering.
        reference: (H, W) log intensity of each pixel's last event.
        threshold: (H, W) change that makes an event.

    `canvas`, `level` and `reference` carry on from call to call.

    Returns:
        The buffer, and the number of events in it, unsorted.
    """
    n = 0
    height, width = canvas.shape
    for s in range(1, times.size):
        began = times[s - 1]
        span = times[s] - times[s - 1]
        for k in range(shapes.shape[0]):
            x_before = centres[s - 1, k, 0]
            y_before = centres[s - 1, k, 1]
            x_now = centres[s, k, 0]
            y_now = centres[s, k, 1]
            if x_now == x_before and y_now == y_before:
                continue
            x0, x1 = _swept_bounds(x_before, x_now, shapes[k, EXTENT_X], width)
            y0, y1 = _swept_bounds(y_before, y_now, shapes[k, EXTENT_Y], height)
            render(canvas, background, shapes, centres[s], y0, y1, x0, x1)
            for y in range(y0, y1):
                for x in range(x0, x1):
                    new = canvas[y, x]
                    old = level[y, x]
                    if new == old:
                        continue
                    level[y, x] = new
                    step = threshold[y, x]
                    sign = np.float32(1 if new > old else -1)
                    while sign * (new - reference[y, x]) >= step:
                        reference[y, x] += sign * step
                        moment = int((reference[y, x] - old) / (new - old) * span)
                        t = began + min(span - 1, moment)
                        out = _append(out, n, t, x, y, 1 if sign > 0 else 0)
                        n += 1
    return out, n


@njit(cache=True, nogil=True)
def move_background(world: Floats, x: float, y: float, background: Floats) -> None:
    """Writes what the sensor sees of a larger background, interpolated linearly.

    Args:
        world: (H + 2 * margin, W + 2 * margin) log intensity.
        x, y: of the sensor's upper left corner on it; at least 0, and 1 pixel from its end.
        background: (H, W), overwritten.
    """
    left = int(x)
    top = int(y)
    u = np.float32(x - left)
    v = np.float32(y - top)
    one = np.float32(1)
    for row in range(background.shape[0]):
        upper = world[top + row]
        lower = world[top + row + 1]
        for column in range(background.shape[1]):
            i = left + column
            above = upper[i] * (one - u) + upper[i + 1] * u
            below = lower[i] * (one - u) + lower[i + 1] * u
            background[row, column] = above * (one - v) + below * v


@njit(cache=True, nogil=True)
def fire_everywhere(
    out: NDArray[np.int64],
    n: int,
    began: int,
    span: int,
    canvas: Floats,
    level: Floats,
    reference: Floats,
    threshold: Floats,
) -> tuple[NDArray[np.int64], int]:
    """As `fire`, of one rendering in which any pixel may have changed.

    Args:
        n: events that are in the buffer already.
        began, span: of the time between the renderings, in us.
        canvas: (H, W) the new rendering.
    """
    for y in range(canvas.shape[0]):
        for x in range(canvas.shape[1]):
            new = canvas[y, x]
            old = level[y, x]
            if new == old:
                continue
            level[y, x] = new
            step = threshold[y, x]
            sign = np.float32(1 if new > old else -1)
            while sign * (new - reference[y, x]) >= step:
                reference[y, x] += sign * step
                moment = int((reference[y, x] - old) / (new - old) * span)
                t = began + min(span - 1, moment)
                out = _append(out, n, t, x, y, 1 if sign > 0 else 0)
                n += 1
    return out, n


@njit(cache=True, nogil=True)
def leave_out_refractory(
    packed: NDArray[np.int64], last: NDArray[np.int64], refractory_us: int
) -> int:
    """Moves the events outside the refractory periods of their pixels to the front.

    Args:
        packed: (N,) events, sorted; changed in place.
        last: (H, W) us of each pixel's last event; carries on from call to call.

    Returns:
        How many events remain.
    """
    n = 0
    for event in packed:
        t = event >> 23
        y = (event >> 12) & 0x7FF
        x = (event >> 1) & 0x7FF
        if t - last[y, x] >= refractory_us:
            last[y, x] = t
            packed[n] = event
            n += 1
    return n


PAINT, MEASURE, CLEAN = range(3)


@njit(cache=True, nogil=True)
def visible_extents(owner: NDArray[np.int16], shapes: Floats, centres: Floats) -> NDArray[np.int64]:
    """Measures the pixels in which each object is on top.

    Args:
        owner: (H, W) zeros; a buffer that is zeros again afterwards.

    Returns:
        (K, 5) left, top, right, bottom (one past the last) and number of these pixels.
    """
    height, width = owner.shape
    extents = np.zeros((shapes.shape[0], 5), np.int64)
    extents[:, 0] = width
    extents[:, 1] = height
    for turn in range(3):
        for k in range(shapes.shape[0]):
            shape = shapes[k]
            extent = extents[k]
            left, right = _bounds(centres[k, 0], shape[EXTENT_X], width)
            top, bottom = _bounds(centres[k, 1], shape[EXTENT_Y], height)
            for y in range(top, bottom):
                for x in range(left, right):
                    if turn == PAINT:
                        dx = x + np.float32(0.5) - centres[k, 0]
                        dy = y + np.float32(0.5) - centres[k, 1]
                        u = shape[COS] * dx + shape[SIN] * dy
                        v = shape[COS] * dy - shape[SIN] * dx
                        if _distance(shape, u, v) <= 0:
                            owner[y, x] = k + 1
                    elif turn == MEASURE and owner[y, x] == k + 1:
                        extent[0] = min(extent[0], x)
                        extent[1] = min(extent[1], y)
                        extent[2] = max(extent[2], x + 1)
                        extent[3] = max(extent[3], y + 1)
                        extent[4] += 1
                    elif turn == CLEAN:
                        owner[y, x] = 0
    return extents


class _HotPixels:
    """Pixels that fire at random times, each at its own rate, with either polarity."""

    def __init__(
        self, size: tuple[int, ...], rng: np.random.Generator, config: SimulatorConfig
    ) -> None:
        """size: (H, W)."""
        height, width = size
        self.rng = rng
        count = min(config.hot_pixels, height * width)
        self.pixels = rng.choice(height * width, count, replace=False)
        self.width = width
        rates = rng.exponential(1.0, count)
        self.hz = config.hot_pixel_hz * float(rates.sum())  # of all together
        self.fractions = rates / max(rates.sum(), 1e-12)

    def events(self, start_us: int, end_us: int) -> NDArray[np.int64]:
        """Their events of [start_us, end_us), packed."""
        n = self.rng.poisson(self.hz * (end_us - start_us) / 1e6)
        t = self.rng.integers(start_us, end_us, n)
        p = self.rng.integers(0, 2, n)
        pixel = self.pixels[self.rng.choice(len(self.pixels), n, p=self.fractions)]
        packed: NDArray[np.int64] = (
            t << 23 | pixel // self.width << 12 | pixel % self.width << 1 | p
        )
        return packed


class Sensor:
    """The pixels and their state between calls."""

    def __init__(
        self,
        background: Floats,
        shapes: Floats,
        centres: Floats,
        rng: np.random.Generator,
        config: SimulatorConfig,
        *,
        hot_rng: np.random.Generator | None = None,
        offset: Floats | None = None,
    ) -> None:
        """Sets all pixels to the scene at time 0.

        Args:
            background: (H, W) log intensity; larger where it moves.
            shapes, centres: of the objects at time 0.
            hot_rng: of hot pixels; None: there are none.
            offset: (2,) x, y of the sensor on a background that moves, at time 0.
        """
        self.world = background
        if offset is not None:
            background = np.empty((config.height, config.width), np.float32)
            move_background(self.world, offset[0], offset[1], background)
        size = background.shape
        height, width = size
        self.config = config
        self.rng = rng
        self.hot_pixels = _HotPixels(size, hot_rng, config) if hot_rng else None
        self.background = background
        self.canvas = background.copy()
        render(self.canvas, background, shapes, centres, 0, height, 0, width)
        self.level = self.canvas.copy()
        mismatch = np.clip(rng.normal(1, config.threshold_mismatch, size), 0.5, 1.5)
        self.threshold = (config.contrast_threshold * mismatch).astype(np.float32)
        offset = rng.uniform(-0.5, 0.5, size).astype(np.float32)
        self.reference = self.level + self.threshold * offset
        self.last = np.full(size, LONG_AGO, np.int64)
        self.out = np.empty(BUFFER_EVENTS, np.int64)

    def events(
        self,
        times: NDArray[np.int64],
        shapes: Floats,
        centres: Floats,
        offsets: Floats | None = None,
    ) -> Events:
        """The events of [times[0], times[-1]), sorted; calls must follow each other in time.

        Args:
            times: (S + 1,) us, of the renderings.
            shapes: (K, columns).
            centres: (S + 1, K, 2).
            offsets: (S + 1, 2) x, y of the sensor on a background that moves.
        """
        if offsets is not None:
            num_fired = self._fire_moving(times, shapes, centres, offsets)
        else:
            self.out, num_fired = fire(
                self.out,
                times,
                shapes,
                centres,
                self.background,
                self.canvas,
                self.level,
                self.reference,
                self.threshold,
            )
        start_us = int(times[0])
        end_us = int(times[-1])
        parts = [self.out[:num_fired], self._noise(start_us, end_us)]
        if self.hot_pixels is not None:
            parts.append(self.hot_pixels.events(start_us, end_us))
        packed = np.sort(np.concatenate(parts))
        num_events = leave_out_refractory(packed, self.last, self.config.refractory_us)
        packed = packed[:num_events]
        return Events(
            packed >> 23,
            ((packed >> 1) & 0x7FF).astype(np.uint16),
            ((packed >> 12) & 0x7FF).astype(np.uint16),
            (packed & 1).astype(np.uint8),
        )

    def _fire_moving(
        self, times: NDArray[np.int64], shapes: Floats, centres: Floats, offsets: Floats
    ) -> int:
        """Fills `out` while the background moves. Returns the number of events."""
        height, width = self.canvas.shape
        num_fired = 0
        for s in range(1, len(times)):
            move_background(self.world, offsets[s, 0], offsets[s, 1], self.background)
            render(self.canvas, self.background, shapes, centres[s], 0, height, 0, width)
            self.out, num_fired = fire_everywhere(
                self.out,
                num_fired,
                int(times[s - 1]),
                int(times[s] - times[s - 1]),
                self.canvas,
                self.level,
                self.reference,
                self.threshold,
            )
        return num_fired

    def _noise(self, start_us: int, end_us: int) -> NDArray[np.int64]:
        """Background events of [start_us, end_us), packed."""
        height, width = self.level.shape
        expected = self.config.noise_hz * height * width * (end_us - start_us) / 1e6
        n = self.rng.poisson(expected)
        t = self.rng.integers(start_us, end_us, n)
        y = self.rng.integers(0, height, n)
        x = self.rng.integers(0, width, n)
        p = self.rng.integers(0, 2, n)
        packed: NDArray[np.int64] = t << 23 | y << 12 | x << 1 | p
        return packed
