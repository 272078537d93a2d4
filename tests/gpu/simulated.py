"""Simulates recordings and prepares them, in a process of its own while the GPU is measured.

    python -m gpu.simulated FOLDER TRAIN VAL SECONDS HEIGHT WIDTH DOWNSAMPLE PROCESSES

Writes FOLDER/shards; its manifest.json is written last.
"""

import multiprocessing
import sys
from pathlib import Path

from evspan.conf.schema.prep import DatasetConfig, FrameConfig, LabelConfig, PrepConfig
from evspan.data_prep.prepare import prepare
from evspan.data_prep.simulator import CLASSES, SimulatorConfig, simulate


def dataset_config(root: Path | str = "") -> DatasetConfig:
    """conf/dataset/simulated.yaml without Hydra, which a bare machine does not have."""
    labels = LabelConfig(class_map={0: 0, 1: 1, 2: 2}, label_every_ms=50)
    return DatasetConfig(name="simulated", root=str(root), classes=list(CLASSES), labels=labels)


def _simulate(path: Path, seconds: float, seed: int, height: int, width: int) -> None:
    config = SimulatorConfig(height=height, width=width)
    simulate(path, seconds=seconds, seed=seed, config=config)


def main() -> None:
    """Runs the command."""
    folder = Path(sys.argv[1])
    seconds = float(sys.argv[4])
    train, val, height, width, downsample, processes = map(int, [*sys.argv[2:4], *sys.argv[5:9]])
    tasks = []
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            path = folder / "raw" / split / f"{split}_{number:03d}_td.raw"
            tasks.append((path, seconds, len(tasks), height, width))
    with multiprocessing.Pool(processes) as pool:
        pool.starmap(_simulate, tasks, chunksize=1)
    prepare(
        PrepConfig(
            source=str(folder / "raw"),
            output=str(folder / "shards"),
            dataset=dataset_config(),
            frames=FrameConfig(downsample=downsample),
            processes=processes,
        )
    )


if __name__ == "__main__":
    main()
