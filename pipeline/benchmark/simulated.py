"""Shards to measure with where there is no dataset: simulated recordings, prepared as usual."""

import math
from pathlib import Path

from evspan.conf.schema.prep import DatasetConfig, FrameConfig, LabelConfig, PrepConfig
from evspan.data_prep.prepare import prepare
from evspan.data_prep.simulator import CLASSES, SimulatorConfig
from evspan.data_prep.simulator.recording_set import SimulatedSet, write_recordings

DOWNSAMPLE = 2
SHORTEST_S = 2.0
RECORDINGS = {"train": 2, "val": 2}


def simulated_dataset(
    folder: Path, *, height: int, width: int, frames: int, split: str, num_classes: int
) -> DatasetConfig:
    """Simulates recordings with boxes and prepares them into `folder`.

    Args:
        folder: exists; gets the recordings and the shards.
        height, width: of the frames, in pixels; the simulated sensor has twice as many.
        frames: that a recording has at least.
        split: of the evaluation; it gets recordings, too.
        num_classes: of the detector's head. Where it has fewer than the simulator has kinds of
            objects, the last kinds share a class.
    """
    frame_config = FrameConfig(downsample=DOWNSAMPLE)
    seconds = max(SHORTEST_S, math.ceil((frames + 2) * frame_config.window_ms / 100) / 10)
    sensor = SimulatorConfig(height=DOWNSAMPLE * height, width=DOWNSAMPLE * width)
    recordings = SimulatedSet(
        folder / "raw", {**RECORDINGS, split: 2}, seconds=seconds, config=sensor
    )
    for _ in write_recordings(recordings.recordings(), processes=1):
        pass
    classes = list(CLASSES[:num_classes])
    last = len(classes) - 1
    class_map = {kind: min(kind, last) for kind in range(len(CLASSES))}
    dataset = DatasetConfig(
        classes=classes, labels=LabelConfig(class_map=class_map, label_every_ms=50)
    )
    shards = folder / "shards"
    prepare(
        PrepConfig(
            source=str(folder / "raw"),
            output=str(shards),
            dataset=dataset,
            frames=frame_config,
            processes=1,
        )
    )
    dataset.root = str(shards)
    return dataset
