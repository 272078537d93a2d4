"""Frames a second that training's loader gives, and how long a training step waits for them.

    .venv/bin/python tests/benchmarks/loader_speed.py [--rows streaming random wait] [--folder /scratch]

Recordings are simulated at 1280 x 720 and prepared at half resolution, 360 x 640, 20 channels; then read from the page cache in
chunks of 5 frames, augmented as in training, by one thread, while this one takes batch after batch and does nothing with them.
Every round reads other batches; a row is the median round. The published loader gave 87 frames/s streaming and 68 at random (one
worker, other recordings, another day): its numbers are told, not measured here.

wait: `evspan train` of one rank as users start it, 2 loader threads beside as many threads of computing as there are cores.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from common import machine
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import AugmentationConfig, Sampling, TrainingConfig
from evspan.data_prep.shards.format import load_manifest
from evspan.pipeline.data.datasets import Dataset, open_dataset
from evspan.pipeline.data.loader import Loader
from evspan.pipeline.data.plan import SamplingPlan
from evspan.pipeline.parallel.world import keep_freed_memory
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

LENGTH = 5
PUBLISHED = {"stream": 87, "random": 68}  # frames/s
WANTED = 350
MAX_WAIT = 0.05
NOTHING = AugmentationConfig(hflip_prob=0, zoom_prob=0)


def prepared(folder: Path, seconds: float) -> Path:
    """Shards of simulated recordings; what is there already stays."""
    raw, shards = folder / "raw", folder / "shards"
    for command in (
        ["simulate", str(raw), "--recordings", "train=4", "--seconds", f"{seconds:g}"],
        ["simulate", str(raw), "--recordings", "val=1", "--seconds", "0.5"],
        ["prep", f"source={raw}", f"output={shards}", "dataset=simulated"],
    ):
        subprocess.run(
            [sys.executable, "-m", "evspan.launch", *command],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=600,
        )
    return shards


def loader(
    data: Dataset, sampling: Sampling, lanes: int, augmentation: AugmentationConfig
) -> Loader:
    config = TrainingConfig(
        batch_size=lanes,
        sequence_length=LENGTH,
        sampling=sampling,
        augmentation=augmentation,
        num_workers=1,
    )
    plan = SamplingPlan(
        [r.frames for r in data.recordings],
        [r.labelled for r in data.recordings],
        lanes=lanes,
        sequence_length=LENGTH,
        sampling=sampling,
        seed=0,
    )
    return Loader(data, plan, range(lanes), range(LENGTH), config, seed=0)


def rate(source: Loader, batches: int, repeats: int) -> float:
    """Frames a second, from when the first batches are there."""
    took = []
    for i in range(repeats):
        given = source.batches(i * batches)
        list(islice(given, 2))
        began = time.perf_counter()
        list(map(len, islice(given, batches)))  # a batch is let go before the next one
        took.append(time.perf_counter() - began)
        given.close()  # type: ignore[attr-defined]
    return batches * len(source.lanes) * LENGTH / median(took)


def reading(data: Dataset, sampling: Sampling, given: argparse.Namespace) -> bool:
    reached = True
    for lanes in given.lanes:
        for name, how in (("augmented", AugmentationConfig()), ("as stored", NOTHING)):
            batches = max(1, given.frames // (lanes * LENGTH))
            told = rate(loader(data, sampling, lanes, how), batches, given.repeats)
            row(
                f"{sampling.name}, lanes: {lanes}, {name}",
                f"{told:.0f} frames/s",
                str(PUBLISHED[sampling.name]),
                f">= {WANTED}",
                told >= WANTED,
            )
            reached &= told >= WANTED
    return reached


def waiting(shards: Path, given: argparse.Namespace) -> bool:
    """Shares that the run itself logs, after a first stretch of warming up."""
    with TemporaryDirectory(prefix="evspan-") as run:
        settings = {
            "dataset.root": shards,
            "run_dir": run,
            "size": given.size,
            "training.batch_size": 2,
            "training.sequence_length": LENGTH,
            "training.num_workers": 2,
            "training.max_steps": 5 * given.steps,
            "training.log_every": given.steps,
            "training.evaluate_every": 0,
            "evaluation.write_detections": "false",
        }
        subprocess.run(
            [
                sys.executable,
                "-m",
                "evspan.launch",
                "train",
                *(f"{k}={v}" for k, v in settings.items()),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=900,
        )
        events = EventAccumulator(run + "/tensorboard")
        events.Reload()
        shares, speeds = (
            [e.value for e in events.Scalars(f"speed/{name}")][1:]
            for name in ("data_wait_fraction", "frames_per_s")
        )
    row(
        f"a training step's wait for data, {given.size}, 2 lanes, 2 workers ({median(speeds):.1f} frames/s)",
        f"{median(shares):.1%}",
        "",
        f"< {MAX_WAIT:.0%}",
        median(shares) < MAX_WAIT,
    )
    return median(shares) < MAX_WAIT


def row(what: str, ours: str, published: str, goal: str, reached: bool | None) -> None:
    print(
        f"| {what} | {ours} | {published} | {goal} | {'' if reached is None else 'yes' if reached else 'NO'} |",
        flush=True,
    )


def tell(shards: Path) -> None:
    entries = load_manifest(shards).split("train")
    frames, events = sum(r.frames for r in entries), sum(r.events for r in entries)
    size = sum((shards / path).stat().st_size for path in {r.shard for r in entries})
    print(
        f"{frames} frames of {len(entries)} recordings, {events / frames / 1e3:.0f} k events and {size / frames / 1e3:.0f} kB "
        "each\n"
    )
    print("| what | ours | published | to reach | reached |\n|---|---|---|---|---|")


@contextmanager
def place(folder: Path | None) -> Iterator[Path]:
    if folder:
        yield folder
        return
    with TemporaryDirectory(prefix="evspan-") as made:
        yield Path(made)


ROWS = ("streaming", "random", "wait")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--lanes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--frames", type=int, default=500, help="of a round")
    parser.add_argument("--seconds", type=float, default=6, help="of a recording")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--size", default="tiny", help="of the network in wait")
    parser.add_argument(
        "--steps", type=int, default=4, help="of a stretch that wait logs; five are run"
    )
    parser.add_argument(
        "--folder", type=Path, help="where recordings and shards are kept for the next time"
    )
    given = parser.parse_args()
    machine()
    keep_freed_memory()  # as every rank does
    with place(given.folder) as folder:
        shards = prepared(folder, given.seconds)
        data = open_dataset(DatasetConfig(root=str(shards)), "train")
        tell(shards)
        reached = [
            reading(data, kind, given)
            for name, kind in (("streaming", Sampling.stream), ("random", Sampling.random))
            if name in given.rows
        ]
        if "wait" in given.rows:
            reached.append(waiting(shards, given))
    sys.exit(0 if all(reached) else 1)


if __name__ == "__main__":
    main()
