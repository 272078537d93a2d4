"""What moves where: objects that cross the sensor one after the other, each along a curve, some with a stop on the way."""

from dataclasses import dataclass, replace

import numpy as np
from evspan.data_prep.simulator.config import CLASSES, SimulatorConfig
from numpy.typing import NDArray

BALL, BOX, BAR = range(len(CLASSES))
# Columns of a shape's row, as the kernels read it: half sides along its own axes (a ball's radius in both), direction of the
# first axis, half sides of the upright box around it, texture period and phase (pixels), mean and swing of its log intensity.
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
LENGTHS = (
    (20.0, 44.0),
    (40.0, 110.0),
    (70.0, 160.0),
)  # pixels, of a ball, a box and a bar; less on a small sensor
SPEEDS = (90.0, 700.0)  # pixels per second
CROSSING_S = (1.5, 5.0)  # without stops
STOP_S = (1.0, 2.2)
BRAKING_US = 300_000  # to slow down from full speed, and to get it again


@dataclass(frozen=True)
class Track:
    """One object's life. Its centre runs along the quadratic Bezier curve of `points` (3, 2), from outside to outside."""

    track_id: int
    class_id: int
    shape: NDArray[np.float32]  # SHAPE_COLUMNS
    area: float  # pixels
    points: NDArray[np.float64]
    born_us: float
    crossing_us: float
    stop_at_us: float  # since birth, when it begins to brake
    stopped_us: float  # 0: it does not stop

    @property
    def dies_us(self) -> float:
        return (
            self.born_us
            + self.crossing_us
            + (self.stopped_us + BRAKING_US if self.stopped_us else 0)
        )

    def centre(self, t_us: NDArray) -> NDArray[np.float32]:
        """(N, 2) x, y of the centre; before and after its life it waits outside, at the curve's ends."""
        moved = np.asarray(t_us, np.float64) - self.born_us
        if self.stopped_us:
            moved = self._moved(moved - self.stop_at_us)
        s = np.clip(moved / self.crossing_us, 0, 1)[:, None]
        a, b, c = self.points
        return ((1 - s) ** 2 * a + 2 * s * (1 - s) * b + s**2 * c).astype(np.float32)

    def _moved(self, after: NDArray) -> NDArray:
        """us at full speed that it has moved as far as, `after` us since the brake; speed falls and rises at a constant rate."""
        # Every term is constant while it rests, so that not even rounding moves it.
        braking = np.clip(after, 0, BRAKING_US)
        starting = np.clip(after - BRAKING_US - self.stopped_us, 0, BRAKING_US)
        before = self.stop_at_us + np.minimum(after, 0)
        since = np.maximum(after - 2 * BRAKING_US - self.stopped_us, 0)
        return (
            before
            + braking
            - braking**2 / (2 * BRAKING_US)
            + starting**2 / (2 * BRAKING_US)
            + since
        )


@dataclass(frozen=True)
class Scene:
    tracks: list[Track]  # painter's order: a later one hides an earlier one
    background: NDArray[np.float32]  # (height, width) log intensity

    def alive(self, start_us: float, end_us: float) -> list[Track]:
        return [t for t in self.tracks if t.born_us <= end_us and t.dies_us >= start_us]


def shapes_and_centres(
    tracks: list[Track], times_us: NDArray
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(K, columns) and (N, K, 2) for the kernels."""
    shapes = np.array([t.shape for t in tracks], np.float32).reshape(-1, len(SHAPE_COLUMNS))
    centres = (
        np.stack([t.centre(times_us) for t in tracks], 1)
        if tracks
        else np.zeros((len(times_us), 0, 2), np.float32)
    )
    return shapes, centres


def make_scene(duration_us: int, rng: np.random.Generator, config: SimulatorConfig) -> Scene:
    """All objects of a recording. `max_objects` places are filled again and again, `min_objects` of them without a gap."""
    tracks: list[Track] = []
    for place in range(config.max_objects):
        t = -rng.uniform(0, 1e6 * CROSSING_S[1])  # the recording begins in the midst of it
        while t < duration_us:
            track = _make_track(len(tracks), t, rng, config)
            tracks.append(track)
            t = track.dies_us + (0 if place < config.min_objects else rng.uniform(0, 3.5e6))
    order = rng.permutation(len(tracks))
    return Scene([tracks[i] for i in order if tracks[i].dies_us > 0], _make_background(rng, config))


def _make_track(
    track_id: int, born_us: float, rng: np.random.Generator, config: SimulatorConfig
) -> Track:
    class_id = int(rng.integers(len(CLASSES)))
    shape, area = _make_shape(class_id, rng, config)
    extent = shape[5:7].astype(np.float64)
    points = _make_curve(extent, rng, config)
    length = _curve_length(points)
    crossing = 1e6 * float(np.clip(length / np.exp(rng.uniform(*np.log(SPEEDS))), *CROSSING_S))
    stop_at, stopped = crossing * rng.uniform(0.3, 0.65), 1e6 * rng.uniform(*STOP_S)
    stops = rng.random() < config.stop_fraction
    track = Track(track_id, class_id, shape, area, points, born_us, crossing, stop_at, stopped)
    at_rest = track.centre(np.array([born_us + stop_at + BRAKING_US]))[0]
    in_sight = (at_rest > extent).all() and (at_rest < (config.width, config.height) - extent).all()
    return track if stops and in_sight else replace(track, stop_at_us=0.0, stopped_us=0.0)


def _make_shape(
    class_id: int, rng: np.random.Generator, config: SimulatorConfig
) -> tuple[NDArray[np.float32], float]:
    """(a row of SHAPE_COLUMNS, area in pixels)."""
    scale = min(1.0, 0.4 * min(config.height, config.width) / LENGTHS[BAR][1])
    length = scale * float(np.exp(rng.uniform(*np.log(LENGTHS[class_id]))))
    if (
        config.min_scale < config.max_scale
    ):  # without a range nothing is drawn: what else is drawn stays as it was
        length *= float(np.exp(rng.uniform(np.log(config.min_scale), np.log(config.max_scale))))
    else:
        length *= config.min_scale
    angle, half_u, half_v = 0.0, length / 2, length / 2
    if class_id == BALL:
        area, period = np.pi * half_u**2, length / 3
    elif class_id == BOX:
        angle, half_v = rng.uniform(-0.15, 0.15), half_u * rng.uniform(0.75, 1.0)
        area, period = 4 * half_u * half_v, length / 3
    else:  # upright, as a walker or a pole is
        angle, half_v = np.pi / 2 + rng.uniform(-0.2, 0.2), half_u / rng.uniform(4.5, 6)
        area, period = 4 * half_u * half_v, max(length / 6, 12.0)
    cos, sin = np.cos(angle), np.sin(angle)
    extent = (half_u, half_u)
    if class_id != BALL:
        extent = (abs(half_u * cos) + abs(half_v * sin), abs(half_u * sin) + abs(half_v * cos))
    mean, swing = rng.choice((-1, 1)) * rng.uniform(0.4, 0.9), rng.uniform(0.6, 0.9)
    row = (
        class_id,
        half_u,
        half_v,
        cos,
        sin,
        *extent,
        max(period, 8.0),
        rng.uniform(0, period),
        mean,
        swing,
    )
    return np.array(row, np.float32), float(area)


def _make_curve(
    extent: NDArray, rng: np.random.Generator, config: SimulatorConfig
) -> NDArray[np.float64]:
    """From just outside one border to just outside another (or the same, further along), bent to one side."""
    size = np.array((config.width, config.height), np.float64)
    while True:
        a, c = _outside_point(size, extent, rng), _outside_point(size, extent, rng)
        chord = c - a
        middle = (a + c) / 2 + rng.uniform(-0.4, 0.4) * np.array((-chord[1], chord[0]))
        half_way = (a + 2 * middle + c) / 4
        if (
            np.hypot(*chord) > 0.35 * size.max()
            and (half_way > extent).all()
            and (half_way < size - extent).all()
        ):
            return np.stack((a, middle, c))


def _outside_point(size: NDArray, extent: NDArray, rng: np.random.Generator) -> NDArray:
    axis, far = int(rng.integers(2)), bool(rng.integers(2))
    point = rng.uniform(0.05, 0.95, 2) * size
    point[axis] = size[axis] + extent[axis] + 2 if far else -extent[axis] - 2
    return point


def _curve_length(points: NDArray) -> float:
    s = np.linspace(0, 1, 33)[:, None]
    curve = (1 - s) ** 2 * points[0] + 2 * s * (1 - s) * points[1] + s**2 * points[2]
    return float(np.hypot(*np.diff(curve, axis=0).T).sum())


def _make_background(rng: np.random.Generator, config: SimulatorConfig) -> NDArray[np.float32]:
    """Smooth blotches: a random grid of 64 px cells, interpolated linearly. It shows where an object's outline passes."""
    grid = rng.uniform(-0.2, 0.2, (config.height // 64 + 2, config.width // 64 + 2))
    y, x = np.arange(config.height) / 64, np.arange(config.width) / 64
    rows = np.stack([np.interp(x, np.arange(grid.shape[1]), row) for row in grid])
    low = y.astype(int)
    share = (y - low)[:, None]
    return (rows[low] * (1 - share) + rows[low + 1] * share).astype(np.float32)
