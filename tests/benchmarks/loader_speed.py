"""Measures the frame rate of training's loader, and how long a training step waits for it.

    .venv/bin/python tests/benchmarks/loader_speed.py [--rows streaming random wait]
        [--presets none standard strong] [--folder DIR] [--baseline PYTHON]

Recordings are simulated at 1280 x 720 and prepared at half resolution, 360 x 640, 20 channels. One
thread reads them from the page cache in chunks of 5 frames and augments them by each preset
(`augmentation=none|standard|strong`; a baseline without presets has the first two). A rate
is in frames per second of its CPU time, so other load counts little. Every round reads other
batches; a row is the median round. The rows `encoded` are what a GPU's loader does, `dense` a
CPU's. --baseline: the interpreter of another version of Evspan, which measures in turn with this
one. The published loader's 87 frames/s streaming and 68 at random (one worker, other recordings,
another day) are quoted, not measured.

wait: `evspan train` on one rank, with 2 loader threads and as many compute threads as cores.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple

from common import print_machine, yes_or_no
from evspan.conf.compose import compose
from evspan.conf.errors import ConfigError
from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import (
    AugmentationConfig,
    Sampling,
    TrainConfig,
    TrainingConfig,
)
from evspan.data_prep.shards.format import load_manifest
from evspan.pipeline.data.datasets import Dataset, open_dataset
from evspan.pipeline.data.loader import Loader
from evspan.pipeline.data.plan import SamplingPlan
from evspan.pipeline.parallel.world import keep_freed_memory
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

LENGTH = 5  # frames of a chunk
PUBLISHED = {"stream": 87, "random": 68}  # frames/s
LEAST_FRAMES_PER_S = {"dense": 350, "encoded": 3000}
MOST_WAIT = 0.05  # of a step
PRESETS = ("none", "standard", "strong")
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


class Case(NamedTuple):
    """What is read. path: dense or encoded."""

    sampling: str
    lanes: int
    preset: str
    path: str

    @property
    def name(self) -> str:
        """The row's name."""
        return f"{self.sampling}, lanes: {self.lanes}, {self.preset}, {self.path}"


def cases(args: argparse.Namespace) -> list[Case]:
    """The rows of the chosen samplings."""
    names = [name for name in SAMPLINGS if name in args.rows]
    return list(map(Case._make, product(names, args.lanes, args.presets, LEAST_FRAMES_PER_S)))


def augmentation_of(preset: str) -> AugmentationConfig | None:
    """The preset's values; None: this version of Evspan does not have it."""
    without_group = {
        "none": AugmentationConfig(hflip_prob=0, zoom_prob=0),
        "standard": AugmentationConfig(),
    }
    try:
        config = compose(TrainConfig, [f"augmentation={preset}"])
    except ConfigError:
        return without_group.get(preset)
    return config.training.augmentation


def make_loader(data: Dataset, case: Case, augmentation: AugmentationConfig) -> Loader:
    """A loader that reads in the caller's thread."""
    sampling = SAMPLINGS[case.sampling]
    config = TrainingConfig(
        batch_size=case.lanes,
        sequence_length=LENGTH,
        sampling=sampling,
        augmentation=augmentation,
        num_workers=0,
    )
    plan = SamplingPlan(
        [r.frames for r in data.recordings],
        [r.labelled for r in data.recordings],
        lanes=case.lanes,
        sequence_length=LENGTH,
        sampling=sampling,
        seed=0,
    )
    return Loader(data, plan, range(case.lanes), range(LENGTH), config, seed=0)


def measure_round(shards: Path, args: argparse.Namespace) -> dict[str, float]:
    """Frames per second of CPU time of every case that this version of Evspan has."""
    keep_freed_memory()  # as every rank does
    data = open_dataset(DatasetConfig(root=str(shards)), "train")
    rates = {}
    for case in cases(args):
        augmentation = augmentation_of(case.preset)
        if augmentation is None:
            continue
        loader = make_loader(data, case, augmentation)
        read = getattr(loader, "batch" if case.path == "dense" else "encoded_batch", None)
        if read is None:
            continue
        num_batches = max(1, args.frames // (case.lanes * LENGTH))
        first = args.round * num_batches
        read(first)
        start = time.thread_time()
        for index in range(first, first + num_batches):
            read(index)  # frees each batch before the next one
        seconds = time.thread_time() - start
        rates[case.name] = num_batches * case.lanes * LENGTH / seconds
    return rates


def measure_rates(
    python: str, shards: Path, number: int, args: argparse.Namespace
) -> dict[str, float]:
    """`measure_round` in a process of its own, with this interpreter's version of Evspan."""
    command = [python, __file__, "--round", str(number), "--folder", str(shards.parent)]
    command += ["--frames", str(args.frames), "--rows", *args.rows]
    command += ["--lanes", *map(str, args.lanes), "--presets", *args.presets]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=900).stdout
    rates: dict[str, float] = json.loads(output)
    return rates


def measure_loader(shards: Path, args: argparse.Namespace) -> bool:
    """Prints rows of frame rates. Returns whether all reach the target."""
    sides = [sys.executable, *filter(None, [args.baseline])]
    rounds: dict[str, list[dict[str, float]]] = {python: [] for python in sides}
    for number in range(args.repeats):
        for python in sides:
            rounds[python].append(measure_rates(python, shards, number, args))
    all_reached = True
    for case in cases(args):
        ours, *others = (
            [rates[case.name] for rates in rounds[python] if case.name in rates] for python in sides
        )
        rate = median(ours)
        text = f"{rate:.0f} frames/s"
        if others and others[0]:
            ratios = [mine / other for mine, other in zip(ours, others[0], strict=True)]
            text += f" (baseline {median(others[0]):.0f}, x {median(ratios):.2f})"
        least = LEAST_FRAMES_PER_S[case.path]
        published = str(PUBLISHED[SAMPLINGS[case.sampling].name])
        print_row(case.name, text, published, f">= {least}", rate >= least)
        all_reached &= rate >= least
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
    parser.add_argument("--lanes", nargs="+", type=int, default=[2, 8])
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS))
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
    parser.add_argument("--baseline", help="interpreter of another version, measured in turn")
    parser.add_argument("--round", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.round is not None:
        print(json.dumps(measure_round(args.folder / "shards", args)))
        return
    print_machine()
    reached = []
    with working_folder(args.folder) as folder:
        shards = prepare_shards(folder, args.seconds)
        print_head(shards)
        if cases(args):
            reached.append(measure_loader(shards, args))
        if "wait" in args.rows:
            reached.append(measure_wait(shards, args))
    sys.exit(0 if all(reached) else 1)


if __name__ == "__main__":
    main()
