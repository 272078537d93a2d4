"""Measures the frame rate of training's loader, and how long a training step waits for it.

    .venv/bin/python tests/benchmarks/loader_speed.py [--rows streaming random wait] [--folder DIR]

Recordings are simulated at 1280 x 720 and prepared at half resolution, 360 x 640, 20 channels. One
loader thread reads them from the page cache in chunks of 5 frames and augments them as in training;
the main thread takes the batches and drops them. Every round reads other batches; a row is the
median round. The published loader's 87 frames/s streaming and 68 at random (one worker, other
recordings, another day) are quoted, not measured.

wait: `evspan train` on one rank, with 2 loader threads and as many compute threads as cores.
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

from common import print_machine, yes_or_no
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import AugmentationConfig, Sampling, TrainingConfig
from evspan.data_prep.shards.format import load_manifest
from evspan.pipeline.data.datasets import Dataset, open_dataset
from evspan.pipeline.data.loader import Loader
from evspan.pipeline.data.plan import SamplingPlan
from evspan.pipeline.parallel.world import keep_freed_memory
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

LENGTH = 5  # frames of a chunk
PUBLISHED = {"stream": 87, "random": 68}  # frames/s
LEAST_FRAMES_PER_S = 350
MOST_WAIT = 0.05  # of a step
AUGMENTATIONS = {
    "augmented": AugmentationConfig(),
    "as stored": AugmentationConfig(hflip_prob=0, zoom_prob=0),
}
SAMPLINGS = {"streaming": Sampling.stream, "random": Sampling.random}
ROWS = (*SAMPLINGS, "wait")


def prepare_shards(folder: Path, seconds: float) -> Path:
    """Makes shards of simulated recordings, and keeps those of an earlier call."""
    raw = folder / "raw"
    shards = folder / "shards"
    for command in (
        ["simulate", str(raw), "--recordings", "train=4", "--seconds", f"{seconds:g}"],
        ["simulate", str(raw), "--recordings", "val=1", "--seconds", "0.5"],
        ["prep", f"source={raw}", f"output={shards}", "dataset=simulated"],
    ):
        run_evspan(command, timeout=600)
    return shards


def run_evspan(words: list[str], timeout: float) -> None:
    """Runs an evspan command without its output."""
    subprocess.run(
        [sys.executable, "-m", "evspan.launch", *words],
        check=True,
        stdout=subprocess.DEVNULL,
        timeout=timeout,
    )


def make_loader(
    data: Dataset, sampling: Sampling, lanes: int, augmentation: AugmentationConfig
) -> Loader:
    """A loader with one worker for all lanes."""
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


def frames_per_s(loader: Loader, num_batches: int, repeats: int) -> float:
    """Median frame rate of the rounds, after two batches each."""
    seconds = []
    for i in range(repeats):
        batches = loader.batches(i * num_batches)
        list(islice(batches, 2))
        start = time.perf_counter()
        list(map(len, islice(batches, num_batches)))  # frees each batch before the next one
        seconds.append(time.perf_counter() - start)
        batches.close()  # type: ignore[attr-defined]  # it is a generator
    return num_batches * len(loader.lanes) * LENGTH / median(seconds)


def measure_loader(data: Dataset, sampling: Sampling, args: argparse.Namespace) -> bool:
    """Prints rows of frame rates. Returns whether all reach the target."""
    all_reached = True
    for lanes in args.lanes:
        for name, augmentation in AUGMENTATIONS.items():
            num_batches = max(1, args.frames // (lanes * LENGTH))
            loader = make_loader(data, sampling, lanes, augmentation)
            rate = frames_per_s(loader, num_batches, args.repeats)
            reached = rate >= LEAST_FRAMES_PER_S
            print_row(
                f"{sampling.name}, lanes: {lanes}, {name}",
                f"{rate:.0f} frames/s",
                str(PUBLISHED[sampling.name]),
                f">= {LEAST_FRAMES_PER_S}",
                reached,
            )
            all_reached &= reached
    return all_reached


def measure_wait(shards: Path, args: argparse.Namespace) -> bool:
    """Trains and prints the row of its wait. Returns whether it reaches the target."""
    with TemporaryDirectory(prefix="evspan-") as run_dir:
        settings = {
            "dataset.root": shards,
            "run_dir": run_dir,
            "size": args.size,
            "training.batch_size": 2,
            "training.sequence_length": LENGTH,
            "training.num_workers": 2,
            "training.max_steps": 5 * args.steps,
            "training.log_every": args.steps,
            "training.evaluate_every": 0,
            "evaluation.write_detections": "false",
        }
        overrides = [f"{key}={value}" for key, value in settings.items()]
        run_evspan(["train", *overrides], timeout=900)
        events = EventAccumulator(run_dir + "/tensorboard")
        events.Reload()
        wait = median_scalar(events, "speed/data_wait_fraction")
        rate = median_scalar(events, "speed/frames_per_s")
    reached = wait < MOST_WAIT
    print_row(
        f"a training step's wait for data, {args.size}, 2 lanes, 2 workers ({rate:.1f} frames/s)",
        f"{wait:.1%}",
        "",
        f"< {MOST_WAIT:.0%}",
        reached,
    )
    return reached


def median_scalar(events: EventAccumulator, tag: str) -> float:
    """Median of a logged value; the first one, of the warm-up, is left out."""
    return median(event.value for event in events.Scalars(tag)[1:])


def print_row(what: str, ours: str, published: str, target: str, reached: bool) -> None:
    """Prints a row of the table."""
    print(f"| {what} | {ours} | {published} | {target} | {yes_or_no(reached)} |", flush=True)


def print_head(shards: Path) -> None:
    """Prints what the shards contain, and the table's head."""
    entries = load_manifest(shards).split("train")
    frames = sum(entry.frames for entry in entries)
    events = sum(entry.events for entry in entries)
    paths = {entry.shard for entry in entries}
    size = sum((shards / path).stat().st_size for path in paths)
    print(
        f"{frames} frames of {len(entries)} recordings, {events / frames / 1e3:.0f} k events and "
        f"{size / frames / 1e3:.0f} kB each\n"
    )
    print("| what | ours | published | target | reached |\n|---|---|---|---|---|")


@contextmanager
def working_folder(folder: Path | None) -> Iterator[Path]:
    """The folder, or a temporary one."""
    if folder:
        yield folder
        return
    with TemporaryDirectory(prefix="evspan-") as temporary:
        yield Path(temporary)


def main() -> None:
    """Prints the table; exit code 1 if a target is not reached."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--lanes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--frames", type=int, default=500, help="frames per round")
    parser.add_argument("--seconds", type=float, default=6, help="length of a recording")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--size", default="tiny", help="size of the network in row `wait`")
    parser.add_argument(
        "--steps", type=int, default=4, help="steps per logged value in row `wait`; five are logged"
    )
    parser.add_argument(
        "--folder", type=Path, help="keeps recordings and shards here for the next call"
    )
    args = parser.parse_args()
    print_machine()
    keep_freed_memory()  # as every rank does
    reached = []
    with working_folder(args.folder) as folder:
        shards = prepare_shards(folder, args.seconds)
        data = open_dataset(DatasetConfig(root=str(shards)), "train")
        print_head(shards)
        for name, sampling in SAMPLINGS.items():
            if name in args.rows:
                reached.append(measure_loader(data, sampling, args))
        if "wait" in args.rows:
            reached.append(measure_wait(shards, args))
    sys.exit(0 if all(reached) else 1)


if __name__ == "__main__":
    main()
