"""Rendering and the pixels of an event camera, as numba kernels.

A pixel fires when its log intensity has moved by its threshold from the level of its last event; crossing times are
interpolated linearly between two renderings (ESIM: Rebecq, Gehrig & Scaramuzza, CoRL 2018). Pixel x covers [x, x + 1).
A pixel that has just fired is blind for the refractory period: what it would have fired is lost, its level still moves.
An event is one int64, `t << 23 | y << 12 | x << 1 | p`, so that sorting the numbers sorts the events.
"""

import math

import numpy as np
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.simulator.config import SimulatorConfig
from evspan.data_prep.simulator.scene import BALL, BOX
from numba import njit
from numpy.typing import NDArray

LONG_AGO = -(1 << 40)


@njit(cache=True, nogil=True, inline="always")
def _distance(shape, u, v):
    """Signed distance of a point to the outline, negative inside; u, v: in the shape's own axes."""
    if shape[0] == BALL:
        return math.sqrt(u * u + v * v) - shape[1]
    return max(abs(u) - shape[1], abs(v) - shape[2])


@njit(cache=True, nogil=True, inline="always")
def _wave(at, period):
    """Square wave of -1 and 1 with flanks of two pixels."""
    share = at / period
    share -= math.floor(share)
    return min(1.0, max(-1.0, (abs(share - 0.5) - 0.25) * period))


@njit(cache=True, nogil=True, inline="always")
def _texture(shape, u, v):
    """Log intensity: rings on a ball, a checker on a box, stripes across a bar."""
    period, phase = shape[7], shape[8]
    if shape[0] == BALL:
        pattern = _wave(math.sqrt(u * u + v * v) + phase, period)
    else:
        pattern = _wave(u + phase, period)
        if shape[0] == BOX:
            pattern *= _wave(v + phase, period)
    return shape[9] + shape[10] * pattern


@njit(cache=True, nogil=True, inline="always")
def _bounds(centre, extent, size):
    """First and one past the last pixel that an object, with its soft edge, can touch on one axis."""
    return max(0, math.floor(centre - extent - 1)), min(size, math.ceil(centre + extent + 1))


@njit(cache=True, nogil=True)
def render(canvas, background, shapes, centres, y0, y1, x0, x1):
    """Log intensity of canvas[y0:y1, x0:x1]: the background, then the objects in order, with edges one pixel soft."""
    for y in range(y0, y1):
        for x in range(x0, x1):
            canvas[y, x] = background[y, x]
    for k in range(shapes.shape[0]):
        shape = shapes[k]
        cx, cy, cos, sin = centres[k, 0], centres[k, 1], shape[3], shape[4]
        left, right = _bounds(cx, shape[5], canvas.shape[1])
        top, bottom = _bounds(cy, shape[6], canvas.shape[0])
        for y in range(max(top, y0), min(bottom, y1)):
            for x in range(max(left, x0), min(right, x1)):
                dx, dy = x + np.float32(0.5) - cx, y + np.float32(0.5) - cy
                u, v = cos * dx + sin * dy, cos * dy - sin * dx
                alpha = np.float32(0.5) - _distance(shape, u, v)
                if alpha > 0:
                    canvas[y, x] += min(np.float32(1), alpha) * (
                        _texture(shape, u, v) - canvas[y, x]
                    )


@njit(cache=True, nogil=True, inline="always")
def _append(out, n, t, x, y, p):
    if n == out.size:
        out = np.concatenate((out, np.empty_like(out)))
    out[n] = (np.int64(t) << 23) | (np.int64(y) << 12) | (np.int64(x) << 1) | p
    return out


@njit(cache=True, nogil=True)
def fire(out, times, shapes, centres, background, canvas, level, reference, threshold):
    """Threshold crossings from times[0] on, up to but without times[-1]; returns (out, how many), unsorted.

    Args:
        out: buffer for packed events; replaced by a larger one where they do not fit.
        times: (S + 1,) int64 us. shapes: (K, columns). centres: (S + 1, K, 2).
        level: (H, W) log intensity as of the last rendering. reference: (H, W) that of the last event. threshold: (H, W).
            The first two and `canvas` carry on.
    """
    n = 0
    height, width = canvas.shape
    for s in range(1, times.size):
        began, span = times[s - 1], times[s] - times[s - 1]
        for k in range(shapes.shape[0]):
            if (
                centres[s, k, 0] == centres[s - 1, k, 0]
                and centres[s, k, 1] == centres[s - 1, k, 1]
            ):
                continue
            x0, x1 = _bounds(min(centres[s, k, 0], centres[s - 1, k, 0]), shapes[k, 5], width)
            x1 = max(
                x1, _bounds(max(centres[s, k, 0], centres[s - 1, k, 0]), shapes[k, 5], width)[1]
            )
            y0, y1 = _bounds(min(centres[s, k, 1], centres[s - 1, k, 1]), shapes[k, 6], height)
            y1 = max(
                y1, _bounds(max(centres[s, k, 1], centres[s - 1, k, 1]), shapes[k, 6], height)[1]
            )
            render(canvas, background, shapes, centres[s], y0, y1, x0, x1)
            for y in range(y0, y1):
                for x in range(x0, x1):
                    new, old = canvas[y, x], level[y, x]
                    if new == old:
                        continue
                    level[y, x] = new
                    step, sign = threshold[y, x], np.float32(1 if new > old else -1)
                    while sign * (new - reference[y, x]) >= step:
                        reference[y, x] += sign * step
                        t = began + min(span - 1, int((reference[y, x] - old) / (new - old) * span))
                        out = _append(out, n, t, x, y, 1 if sign > 0 else 0)
                        n += 1
    return out, n


@njit(cache=True, nogil=True)
def leave_out_refractory(packed, last, refractory):
    """Move the events of pixels that are not blind to the front; returns how many.

    packed: sorted. last: (H, W) us, carries on.
    """
    n = 0
    for event in packed:
        t, y, x = event >> 23, (event >> 12) & 0x7FF, (event >> 1) & 0x7FF
        if t - last[y, x] >= refractory:
            last[y, x] = t
            packed[n] = event
            n += 1
    return n


@njit(cache=True, nogil=True)
def visible_extents(owner, shapes, centres):
    """(K, 5) int64: left, top, right, bottom (one past the last) and count of the pixels in which each object is on top.

    owner: (H, W) int16 zeros; comes back as zeros.
    """
    found = np.zeros((shapes.shape[0], 5), np.int64)
    found[:, 0], found[:, 1] = owner.shape[1], owner.shape[0]
    for turn in range(3):  # paint all, then measure all, then clean up
        for k in range(shapes.shape[0]):
            shape = shapes[k]
            left, right = _bounds(centres[k, 0], shape[5], owner.shape[1])
            top, bottom = _bounds(centres[k, 1], shape[6], owner.shape[0])
            for y in range(top, bottom):
                for x in range(left, right):
                    if turn == 0:
                        dx, dy = (
                            x + np.float32(0.5) - centres[k, 0],
                            y + np.float32(0.5) - centres[k, 1],
                        )
                        if (
                            _distance(
                                shape, shape[3] * dx + shape[4] * dy, shape[3] * dy - shape[4] * dx
                            )
                            <= 0
                        ):
                            owner[y, x] = k + 1
                    elif turn == 1 and owner[y, x] == k + 1:
                        found[k, 0], found[k, 1] = min(found[k, 0], x), min(found[k, 1], y)
                        found[k, 2], found[k, 3] = max(found[k, 2], x + 1), max(found[k, 3], y + 1)
                        found[k, 4] += 1
                    elif turn == 2:
                        owner[y, x] = 0
    return found


class Sensor:
    """The pixels' memory. `background`: (H, W) log intensity that they have settled on at time 0."""

    def __init__(
        self,
        background: NDArray[np.float32],
        shapes: NDArray[np.float32],
        centres: NDArray[np.float32],
        rng: np.random.Generator,
        config: SimulatorConfig,
    ) -> None:
        size = background.shape
        self.config, self.rng, self.background = config, rng, background
        self.canvas = background.copy()
        render(self.canvas, background, shapes, centres, 0, size[0], 0, size[1])
        self.level = self.canvas.copy()
        mismatch = np.clip(rng.normal(1, config.threshold_mismatch, size), 0.5, 1.5)
        self.threshold = (config.contrast_threshold * mismatch).astype(np.float32)
        self.reference = self.level + self.threshold * rng.uniform(-0.5, 0.5, size).astype(
            np.float32
        )
        self.last = np.full(size, LONG_AGO, np.int64)
        self.out = np.empty(1 << 18, np.int64)

    def events(self, times: NDArray[np.int64], shapes: NDArray, centres: NDArray) -> Events:
        """The events of [times[0], times[-1]), sorted; calls must follow each other in time."""
        self.out, n = fire(
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
        packed = np.sort(np.concatenate((self.out[:n], self._noise(int(times[0]), int(times[-1])))))
        packed = packed[: leave_out_refractory(packed, self.last, self.config.refractory_us)]
        x, y, p = (packed >> 1) & 0x7FF, (packed >> 12) & 0x7FF, packed & 1
        return Events(packed >> 23, x.astype(np.uint16), y.astype(np.uint16), p.astype(np.uint8))

    def _noise(self, start: int, end: int) -> NDArray[np.int64]:
        height, width = self.level.shape
        n = self.rng.poisson(self.config.noise_hz * height * width * (end - start) / 1e6)
        t, y, x, p = (
            self.rng.integers(low, high, n)
            for low, high in ((start, end), (0, height), (0, width), (0, 2))
        )
        return t << 23 | y << 12 | x << 1 | p
