"""The scene: objects that cross the sensor one after the other, each along a curve.

Some of them stop on the way.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from evspan.data_prep.simulator.config import CLASSES, SimulatorConfig
from numpy.typing import NDArray

BALL, BOX, BAR = range(len(CLASSES))
# Columns of a shape's row, as the kernels read it: class, half sides along its own axes (a ball's
# radius in both), direction of the first axis, half sides of the upright box around it, texture
# period and phase (pixels), mean and swing of its log intensity.
SHAPE_COLUMNS = (
    "kind",
    "half_u",
    "half_v",
    "cos",
    "sin",
    "extent_x",
    "extent_y",
    "period",
    "phase",
    "mean",
    "swing",
)
KIND, HALF_U, HALF_V, COS, SIN, EXTENT_X, EXTENT_Y, PERIOD, PHASE, MEAN, SWING = range(11)
# Pixels of a ball, a box and a bar; less on a small sensor.
LENGTHS = ((20.0, 44.0), (40.0, 110.0), (70.0, 160.0))
SPEEDS = (90.0, 700.0)  # pixels per second
CROSSING_S = (1.5, 5.0)  # without stops
LONGEST_PAUSE_US = 3.5e6  # between two objects
BRAKING_US = 300_000  # to slow down from full speed, and to reach it again
BACKGROUND_CELL = 64  # pixels
BLOTCHES = 0.2  # largest log intensity
TEXTURE_CELL = 6  # pixels
PATCH_SIDES = (8, 60)  # pixels
PATCH_INTENSITY = 0.6  # largest log intensity of clutter
SWAY_HZ = (0.15, 0.6)


@dataclass(frozen=True)
class Track:
    """The life of one object.

    Its centre runs along the quadratic Bezier curve of `points`, from outside to outside.
    """

    track_id: int
    class_id: int
    shape: NDArray[np.float32]  # a value of each of SHAPE_COLUMNS
    area: float  # pixels
    points: NDArray[np.float64]  # (3, 2) x, y
    born_us: float
    crossing_us: float
    stop_at_us: float  # since birth, when it begins to brake
    stopped_us: float  # 0: it does not stop

    @property
    def dies_us(self) -> float:
        """When it has left the sensor."""
        stop_us = self.stopped_us + BRAKING_US if self.stopped_us else 0
        return self.born_us + self.crossing_us + stop_us

    def centre(self, t_us: NDArray[np.int64] | NDArray[np.float64]) -> NDArray[np.float32]:
        """Its centre over time; before and after its life it waits outside, at the curve's ends.

        Args:
            t_us: (N,) times.

        Returns:
            (N, 2) x, y in pixels.
        """
        moved = np.asarray(t_us, np.float64) - self.born_us
        if self.stopped_us:
            moved = self._moved(moved - self.stop_at_us)
        s = np.clip(moved / self.crossing_us, 0, 1)[:, None]
        a, b, c = self.points
        centre = (1 - s) ** 2 * a + 2 * s * (1 - s) * b + s**2 * c
        return np.asarray(centre).astype(np.float32)

    def _moved(self, after_us: NDArray[np.float64]) -> NDArray[np.float64]:
        """The distance it has moved, as the time in us that it takes at full speed.

        Its speed falls and rises at a constant rate.

        Args:
            after_us: (N,) times since the brake.
        """
        # Every term is constant while it rests, so that not even rounding moves it.
        braking = np.clip(after_us, 0, BRAKING_US)
        starting = np.clip(after_us - BRAKING_US - self.stopped_us, 0, BRAKING_US)
        before = self.stop_at_us + np.minimum(after_us, 0)
        since = np.maximum(after_us - 2 * BRAKING_US - self.stopped_us, 0)
        moved: NDArray[np.float64] = (
            before
            + braking
            - braking**2 / (2 * BRAKING_US)
            + starting**2 / (2 * BRAKING_US)
            + since
        )
        return moved


@dataclass(frozen=True)
class Sway:
    """The camera's movement over the background: a sum of two sines per axis.

    Attributes:
        amplitude, frequency, phase: (2, 2) of each axis (x, y) and sine; pixels, Hz, radians.
        margin: pixels that the background has on each side of the sensor.
    """

    amplitude: NDArray[np.float64]
    frequency: NDArray[np.float64]
    phase: NDArray[np.float64]
    margin: int

    def offsets(self, times_us: NDArray[np.int64]) -> NDArray[np.float32]:
        """(N, 2) x, y of the sensor's upper left corner on the background."""
        seconds = np.asarray(times_us)[:, None, None] / 1e6
        sines = self.amplitude * np.sin(2 * np.pi * self.frequency * seconds + self.phase)
        return np.asarray(self.margin + sines.sum(-1)).astype(np.float32)


@dataclass(frozen=True)
class Scene:
    """All objects of a recording, and the background.

    Attributes:
        tracks: in painter's order: a later one hides an earlier one.
        background: (height, width) log intensity; with a sway, larger by its margin on each side.
        sway: how the camera moves over the background; None: it is at rest.
    """

    tracks: list[Track]
    background: NDArray[np.float32]
    sway: "Sway | None" = None

    def alive(self, start_us: float, end_us: float) -> list[Track]:
        """The objects whose life overlaps a time span, in painter's order."""
        return [t for t in self.tracks if t.born_us <= end_us and t.dies_us >= start_us]


def shapes_and_centres(
    tracks: list[Track], times_us: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The objects as the kernels read them.

    Args:
        tracks: K objects.
        times_us: (N,) times.

    Returns:
        (K, columns) shapes and (N, K, 2) centres.
    """
    shapes = np.array([t.shape for t in tracks], np.float32).reshape(-1, len(SHAPE_COLUMNS))
    if not tracks:
        return shapes, np.zeros((len(times_us), 0, 2), np.float32)
    return shapes, np.stack([t.centre(times_us) for t in tracks], axis=1)


def make_scene(
    duration_us: int,
    rng: np.random.Generator,
    config: SimulatorConfig,
    background_rng: np.random.Generator | None = None,
) -> Scene:
    """Draws all objects of a recording.

    At most `max_objects` exist at a time. `min_objects` of them are replaced at once when they
    leave, the others after a pause.

    Args:
        background_rng: of texture, clutter and sway, so that they leave all other values as they
            are; None: one of a fixed seed.
    """
    tracks: list[Track] = []
    for slot in range(config.max_objects):
        t = -rng.uniform(0, 1e6 * CROSSING_S[1])  # some are on their way when the recording begins
        while t < duration_us:
            track = _make_track(len(tracks), t, rng, config)
            tracks.append(track)
            pause = 0 if slot < config.min_objects else rng.uniform(0, LONGEST_PAUSE_US)
            t = track.dies_us + pause
    order = rng.permutation(len(tracks))
    visible = [tracks[i] for i in order if tracks[i].dies_us > 0]
    background_rng = background_rng or np.random.default_rng(0)
    sway = _make_sway(background_rng, config) if config.ego_speed else None
    margin = sway.margin if sway else 0
    height = config.height + 2 * margin
    width = config.width + 2 * margin
    amplitude = BLOTCHES * config.background_contrast
    background = _blotches(rng, height, width, BACKGROUND_CELL, amplitude)
    if config.background_texture:
        texture = _blotches(background_rng, height, width, TEXTURE_CELL, config.background_texture)
        background += texture
    for _ in range(config.clutter):
        _paint_patch(background, background_rng)
    return Scene(visible, background, sway)


def _make_track(
    track_id: int, born_us: float, rng: np.random.Generator, config: SimulatorConfig
) -> Track:
    class_id = int(rng.integers(len(CLASSES)))
    shape, area = _make_shape(class_id, rng, config)
    extent = shape[EXTENT_X : EXTENT_Y + 1].astype(np.float64)
    points = _make_curve(extent, rng, config)
    speed = np.exp(rng.uniform(*np.log(SPEEDS)))
    crossing_s = float(np.clip(_curve_length(points) / speed, *CROSSING_S))
    crossing_us = 1e6 * crossing_s / config.speed
    stop_at_us = crossing_us * rng.uniform(0.3, 0.65)
    stopped_us = 1e6 * rng.uniform(config.min_rest_s, config.max_rest_s)
    track = Track(
        track_id, class_id, shape, area, points, born_us, crossing_us, stop_at_us, stopped_us
    )
    stops = rng.random() < config.stop_fraction
    at_rest = track.centre(np.array([born_us + stop_at_us + BRAKING_US]))[0]
    size = (config.width, config.height)
    in_sight = (at_rest > extent).all() and (at_rest < size - extent).all()
    if stops and in_sight:
        return track
    return replace(track, stop_at_us=0.0, stopped_us=0.0)


def _make_shape(
    class_id: int, rng: np.random.Generator, config: SimulatorConfig
) -> tuple[NDArray[np.float32], float]:
    """A row of SHAPE_COLUMNS, and the area in pixels."""
    scale = min(1.0, 0.4 * min(config.height, config.width) / LENGTHS[BAR][1])
    length = scale * float(np.exp(rng.uniform(*np.log(LENGTHS[class_id]))))
    if config.min_scale < config.max_scale:
        length *= float(np.exp(rng.uniform(np.log(config.min_scale), np.log(config.max_scale))))
    else:  # without a range nothing is drawn, so that all other values stay the same
        length *= config.min_scale
    half_u = length / 2
    half_v = half_u
    angle = 0.0
    if class_id == BALL:
        area = np.pi * half_u**2
        period = length / 3
    elif class_id == BOX:
        angle = rng.uniform(-0.15, 0.15)
        half_v = half_u * rng.uniform(0.75, 1.0)
        area = 4 * half_u * half_v
        period = length / 3
    else:  # upright, as a pedestrian or a pole is
        angle = np.pi / 2 + rng.uniform(-0.2, 0.2)
        half_v = half_u / rng.uniform(4.5, 6)
        area = 4 * half_u * half_v
        period = max(length / 6, 12.0)
    cos = np.cos(angle)
    sin = np.sin(angle)
    extent_x = half_u
    extent_y = half_u
    if class_id != BALL:
        extent_x = abs(half_u * cos) + abs(half_v * sin)
        extent_y = abs(half_u * sin) + abs(half_v * cos)
    # The generator's values are drawn in this order: another one gives other recordings.
    mean = rng.choice((-1, 1)) * rng.uniform(0.4, 0.9)
    swing = rng.uniform(0.6, 0.9)
    phase = rng.uniform(0, period)
    row = np.zeros(len(SHAPE_COLUMNS), np.float32)
    row[KIND] = class_id
    row[HALF_U] = half_u
    row[HALF_V] = half_v
    row[COS] = cos
    row[SIN] = sin
    row[EXTENT_X] = extent_x
    row[EXTENT_Y] = extent_y
    row[PERIOD] = max(period, 8.0)
    row[PHASE] = phase
    row[MEAN] = config.object_contrast * mean
    row[SWING] = config.object_contrast * swing
    return row, float(area)


def _make_curve(
    extent: NDArray[np.float64], rng: np.random.Generator, config: SimulatorConfig
) -> NDArray[np.float64]:
    """(3, 2) points of a curve from just outside one border to just outside another, bent.

    It may come back to the same border, further along.
    """
    size = np.array((config.width, config.height), np.float64)
    while True:
        a = _outside_point(size, extent, rng)
        c = _outside_point(size, extent, rng)
        chord = c - a
        normal = np.array((-chord[1], chord[0]))
        middle = (a + c) / 2 + rng.uniform(-0.4, 0.4) * normal
        half_way = (a + 2 * middle + c) / 4
        is_long = np.hypot(*chord) > 0.35 * size.max()
        if is_long and (half_way > extent).all() and (half_way < size - extent).all():
            return np.stack((a, middle, c))


def _outside_point(
    size: NDArray[np.float64], extent: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """(2,) x, y of a centre just outside a random border."""
    axis = int(rng.integers(2))
    is_far_border = bool(rng.integers(2))
    point: NDArray[np.float64] = rng.uniform(0.05, 0.95, 2) * size
    point[axis] = size[axis] + extent[axis] + 2 if is_far_border else -extent[axis] - 2
    return point


def _curve_length(points: NDArray[np.float64]) -> float:
    """Pixels, from 32 straight pieces."""
    s = np.linspace(0, 1, 33)[:, None]
    curve: NDArray[Any] = (1 - s) ** 2 * points[0] + 2 * s * (1 - s) * points[1] + s**2 * points[2]
    return float(np.hypot(*np.diff(curve, axis=0).T).sum())


def _blotches(
    rng: np.random.Generator, height: int, width: int, cell: int, amplitude: float
) -> NDArray[np.float32]:
    """(height, width) smooth blotches: a random grid, interpolated linearly.

    They make the outline of an object visible against the background.

    Args:
        cell: distance of the grid's points in pixels.
        amplitude: largest log intensity.
    """
    grid_size = (height // cell + 2, width // cell + 2)
    grid = rng.uniform(-amplitude, amplitude, grid_size)
    y = np.arange(height) / cell
    x = np.arange(width) / cell
    rows = np.stack([np.interp(x, np.arange(grid.shape[1]), row) for row in grid])
    low = y.astype(int)
    weight = (y - low)[:, None]
    background = rows[low] * (1 - weight) + rows[low + 1] * weight
    return np.asarray(background).astype(np.float32)


def _paint_patch(background: NDArray[np.float32], rng: np.random.Generator) -> None:
    """Paints a plain ellipse or rectangle at a random place."""
    height, width = background.shape
    shortest, longest = np.log(PATCH_SIDES)
    half_h, half_w = np.exp(rng.uniform(shortest, longest, 2)) / 2
    cy = rng.uniform(0, height)
    cx = rng.uniform(0, width)
    is_ellipse = bool(rng.integers(2))
    intensity = rng.uniform(-PATCH_INTENSITY, PATCH_INTENSITY)
    rows = slice(max(0, int(cy - half_h)), int(cy + half_h) + 1)
    columns = slice(max(0, int(cx - half_w)), int(cx + half_w) + 1)
    part = background[rows, columns]
    if is_ellipse:
        y = np.arange(rows.start, rows.start + part.shape[0])[:, None] + 0.5 - cy
        x = np.arange(columns.start, columns.start + part.shape[1]) + 0.5 - cx
        part[(y / half_h) ** 2 + (x / half_w) ** 2 <= 1] = intensity
    else:
        part[:] = intensity


def _make_sway(rng: np.random.Generator, config: SimulatorConfig) -> Sway:
    """A sway of which the largest speed, of both axes together, is `ego_speed`."""
    slowest, fastest = np.log(SWAY_HZ)
    frequency = np.exp(rng.uniform(slowest, fastest, (2, 2)))
    fractions = rng.uniform(0.3, 1.0, (2, 2))
    per_axis = fractions.sum(1)
    fractions *= config.ego_speed / np.hypot(*per_axis)
    amplitude = fractions / (2 * np.pi * frequency)
    margin = int(np.ceil(amplitude.sum(1).max())) + 2
    return Sway(amplitude, frequency, rng.uniform(0, 2 * np.pi, (2, 2)), margin)
