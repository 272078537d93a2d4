"""Simulates one recording: its events, its boxes, and both as files."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

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
MIN_VISIBLE_FRACTION = 0.3  # of an object's area; with less it has no box
BLOCK_US = 50_000  # of events, at once in memory
DEFAULT = SimulatorConfig()


@dataclass(frozen=True)
class SimulationReport:
    """The files that `simulate` wrote, and their contents."""

    path: Path
    boxes_path: Path
    events: int
    boxes: int
    tracks: int


def simulated_scene(seconds: float, seed: int, config: SimulatorConfig = DEFAULT) -> Scene:
    """The objects and the background of a recording.

    Raises:
        ConfigError: more seconds than the formats can represent, or none.
    """
    generators = _generators(seed)
    return make_scene(_duration_us(seconds), generators.scene, config, generators.background)


def simulated_events(
    seconds: float, seed: int, config: SimulatorConfig = DEFAULT
) -> Iterator[Events]:
    """Yields the events of a recording, sorted by time from 0 us on, in blocks of bounded size.

    Raises:
        ConfigError: more seconds than the formats can represent, or none.
    """
    duration_us = _duration_us(seconds)
    scene = simulated_scene(seconds, seed, config)
    generators = _generators(seed)
    sway = scene.sway
    sensor = Sensor(
        scene.background,
        *_shapes_and_centres_at(scene, 0),
        generators.sensor,
        config,
        hot_rng=generators.hot_pixels if config.hot_pixels else None,
        offset=sway.offsets(np.zeros(1, np.int64))[0] if sway else None,
    )
    for start in range(0, duration_us, BLOCK_US):
        end = min(start + BLOCK_US, duration_us)
        times = np.append(np.arange(start, end, config.step_us, dtype=np.int64), end)
        shapes, centres = shapes_and_centres(scene.alive(start, end), times)
        yield sensor.events(times, shapes, centres, sway.offsets(times) if sway else None)


def simulated_boxes(
    seconds: float, seed: int, config: SimulatorConfig = DEFAULT
) -> NDArray[np.void]:
    """Boxes at 60 Hz: the upright box around the visible part of each object, inside the sensor.

    An object of which less than 30 % is visible, because it is outside or hidden, has none.

    Returns:
        (N,) of dtype RAW_BOX, sorted by time.

    Raises:
        ConfigError: more seconds than the formats can represent, or none.
    """
    duration_us = _duration_us(seconds)
    scene = simulated_scene(seconds, seed, config)
    owner = np.zeros((config.height, config.width), np.int16)
    rows = []
    for k in range(1, int(LABEL_HZ * seconds) + 1):
        t = round(1e6 * k / LABEL_HZ)
        if t >= duration_us:
            break
        extents = visible_extents(owner, *_shapes_and_centres_at(scene, t))
        for track, extent in zip(scene.alive(t, t), extents.tolist(), strict=True):
            left, top, right, bottom, visible_pixels = extent
            if visible_pixels < MIN_VISIBLE_FRACTION * track.area:
                continue
            width = right - left
            height = bottom - top
            rows.append((t, left, top, width, height, track.class_id, track.track_id, 1.0))
    return np.array(rows, RAW_BOX)


def _duration_us(seconds: float) -> int:
    require(0 < seconds <= 2000, f"seconds is {seconds}; give more than 0 and up to 2000 s")
    return round(1e6 * seconds)


class _Generators(NamedTuple):
    """Of a recording: several, so that a change of one part leaves the others as they are.

    So the objects and the boxes do not depend on the sensor, nor on the background.
    """

    scene: np.random.Generator
    sensor: np.random.Generator
    background: np.random.Generator
    hot_pixels: np.random.Generator


def _generators(seed: int) -> _Generators:
    return _Generators(*map(np.random.default_rng, np.random.SeedSequence(seed).spawn(4)))


def _shapes_and_centres_at(
    scene: Scene, t_us: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(K, columns) shapes and (K, 2) centres of the objects at one time."""
    shapes, centres = shapes_and_centres(scene.alive(t_us, t_us), np.array([t_us]))
    return shapes, centres[0]


def simulate(
    path: str | Path, *, seconds: float, seed: int, config: SimulatorConfig = DEFAULT
) -> SimulationReport:
    """Writes a recording and its boxes next to it; each file appears whole or not at all.

    Args:
        path: .raw (EVT3), .dat or .h5.

    Raises:
        RecordingError: another suffix.
        ConfigError: values that cannot be simulated.
    """
    path = Path(path)
    boxes_path = path.with_name(f"{recording_name(path)}_bbox.npy")
    path.parent.mkdir(parents=True, exist_ok=True)
    first_us = 0
    last_us = -1
    num_events = 0
    with TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
        temporary_path = Path(folder) / path.name
        temporary_boxes_path = Path(folder) / boxes_path.name
        with open_writer(temporary_path, config.height, config.width) as writer:
            for events in simulated_events(seconds, seed, config):
                writer.write(events)
                if not events.t.size:
                    continue
                if not num_events:
                    first_us = int(events.t[0])
                last_us = int(events.t[-1])
                num_events += events.t.size
        boxes = simulated_boxes(seconds, seed, config)
        # Without noise, boxes may lie before the first event or after the last.
        boxes = boxes[(boxes["t"] > first_us) & (boxes["t"] <= last_us)]
        write_boxes(temporary_boxes_path, boxes)
        # Boxes first: a recording without them would pass for an unlabelled one.
        os.replace(temporary_boxes_path, boxes_path)
        os.replace(temporary_path, path)
    num_tracks = len(np.unique(boxes["track_id"]))
    return SimulationReport(path, boxes_path, num_events, boxes.size, num_tracks)
