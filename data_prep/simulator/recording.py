"""One simulated recording: its events, its boxes, and both as files."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from evspan.conf.errors import require
from evspan.data_prep.labels.box_files import RAW_BOX, recording_name, write_boxes
from evspan.data_prep.recordings.events import Events
from evspan.data_prep.recordings.open import open_writer
from evspan.data_prep.simulator.config import SimulatorConfig
from evspan.data_prep.simulator.scene import Scene, make_scene, shapes_and_centres
from evspan.data_prep.simulator.sensor import Sensor, visible_extents
from numpy.typing import NDArray

LABEL_HZ = 60
MIN_VISIBLE_SHARE = 0.3  # of an object's area, or it has no box
BLOCK_US = 50_000  # at once in memory


@dataclass(frozen=True)
class SimulationReport:
    """What `simulate` wrote."""

    path: Path
    boxes_path: Path
    events: int
    boxes: int
    tracks: int


def _scene_and_rng(
    seconds: float, seed: int, config: SimulatorConfig
) -> tuple[int, Scene, np.random.Generator]:
    require(0 < seconds <= 2000, f"seconds is {seconds}; give more than 0 and up to 2000 s")
    # Two generators, so that a change of the sensor leaves the scene, and the boxes, as they are.
    scene_rng, sensor_rng = (
        np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2)
    )
    duration = round(1e6 * seconds)
    return duration, make_scene(duration, scene_rng, config), sensor_rng


DEFAULT = SimulatorConfig()


def simulated_events(
    seconds: float, seed: int, config: SimulatorConfig = DEFAULT
) -> Iterator[Events]:
    """The events of a recording, sorted by time from 0 us on, in blocks of bounded size."""
    duration, scene, rng = _scene_and_rng(seconds, seed, config)
    sensor = Sensor(scene.background, *_at(scene, 0), rng, config)
    for start in range(0, duration, BLOCK_US):
        end = min(start + BLOCK_US, duration)
        times = np.append(np.arange(start, end, config.step_us, dtype=np.int64), end)
        yield sensor.events(times, *shapes_and_centres(scene.alive(start, end), times))


def simulated_boxes(seconds: float, seed: int, config: SimulatorConfig = DEFAULT) -> NDArray:
    """(N,) RAW_BOX at 60 Hz: the upright box around what is visible of each object, inside the sensor.

    An object of which less than 30 % is visible, since it is outside or hidden, has none.
    """
    duration, scene, _ = _scene_and_rng(seconds, seed, config)
    owner = np.zeros((config.height, config.width), np.int16)
    rows = []
    times = (round(1e6 * k / LABEL_HZ) for k in range(1, int(LABEL_HZ * seconds) + 1))
    for t in (t for t in times if t < duration):
        found = visible_extents(owner, *_at(scene, t))
        for track, (x0, y0, x1, y1, count) in zip(scene.alive(t, t), found.tolist(), strict=True):
            if count >= MIN_VISIBLE_SHARE * track.area:
                rows.append((t, x0, y0, x1 - x0, y1 - y0, track.class_id, track.track_id, 1.0))
    return np.array(rows, RAW_BOX)


def _at(scene: Scene, t: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    shapes, centres = shapes_and_centres(scene.alive(t, t), np.array([t]))
    return shapes, centres[0]


def simulate(
    path: str | Path, *, seconds: float, seed: int, config: SimulatorConfig = DEFAULT
) -> SimulationReport:
    """Write a recording to `path` (.raw EVT3, .dat or .h5) and its boxes beside it; each appears whole or not at all.

    Raises:
        RecordingError: a suffix that no writer knows. ConfigError: values that cannot be simulated.
    """
    path = Path(path)
    boxes_path = path.with_name(f"{recording_name(path)}_bbox.npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    first, last, count = 0, -1, 0
    with TemporaryDirectory(prefix=".writing-", dir=path.parent) as beside:
        with open_writer(Path(beside) / path.name, config.height, config.width) as writer:
            for events in simulated_events(seconds, seed, config):
                writer.write(events)
                if events.t.size:
                    first, last = first if count else int(events.t[0]), int(events.t[-1])
                    count += events.t.size
        boxes = simulated_boxes(seconds, seed, config)
        boxes = boxes[
            (boxes["t"] > first) & (boxes["t"] <= last)
        ]  # without noise the first and last events may lie inside
        write_boxes(Path(beside) / boxes_path.name, boxes)
        # Boxes first: a recording without them would pass for an unlabelled one.
        os.replace(Path(beside) / boxes_path.name, boxes_path)
        os.replace(Path(beside) / path.name, path)
    return SimulationReport(path, boxes_path, count, boxes.size, len(np.unique(boxes["track_id"])))
