"""Measures what several roots, class maps and repeat factors cost training's loader.

    .venv/bin/python tests/benchmarks/roots_speed.py [--folder DIR] [--repeats N] [--frames N]
        [--baseline PYTHON]

Two sets of simulated recordings are read as one root, as two with weights, with a class map and
with repeat factors, by one thread without augmentation, in turn; a rate is in frames per second of
its CPU time, the median of the rounds. Also: the time of one chunk of the plan, and of the factors
at the start of a run. --baseline: the interpreter of another version of Evspan, which measures one
root in turn with this one.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from evspan.conf.schema.prep import DatasetConfig
from evspan.conf.schema.training import AugmentationConfig, Sampling, TrainingConfig
from evspan.pipeline.data.datasets import open_dataset
from evspan.pipeline.data.loader import Loader
from evspan.pipeline.data.plan import SamplingPlan
from evspan.pipeline.parallel.world import keep_freed_memory

LENGTH = 5
LANES = 8
CHUNKS = 20_000  # of the plan
VARIANTS = ("one root", "two roots", "class map", "repeat factors")


def prepare(folder: Path) -> list[Path]:
    """Two sets of shards."""
    from loader_speed import run_evspan

    roots = []
    for name, seed in (("a", "1"), ("b", "2")):
        raw = folder / name / "raw"
        roots.append(folder / name / "shards")
        if (roots[-1] / "manifest.json").exists():  # of another version, which must read them too
            continue
        words = ["--recordings", "train=3", "--seconds", "4", "--seed", seed]
        run_evspan(["simulate", str(raw), *words], timeout=600)
        run_evspan(["prep", f"source={raw}", f"output={roots[-1]}", "dataset=simulated"], 600)
    return roots


def dataset_config(variant: str, roots: list[Path]) -> DatasetConfig:
    """The dataset of a variant."""
    if variant == "one root":
        return DatasetConfig(root=str(roots[0]))
    from evspan.conf.schema.prep import DatasetRoot

    class_map: dict[str, str | None] = {}
    if variant == "class map":
        class_map = {"ball": "bar", "bar": None}
    sources = [
        DatasetRoot(root=str(roots[0])),
        DatasetRoot(root=str(roots[1]), weight=3, class_map=class_map),
    ]
    return DatasetConfig(roots=sources)


def loader_of(variant: str, roots: list[Path]) -> Loader:
    """A loader that reads in the caller's thread."""
    config: dict[str, Any] = {
        "batch_size": LANES,
        "sequence_length": LENGTH,
        "sampling": Sampling.mixed,
        "augmentation": AugmentationConfig(hflip_prob=0, zoom_prob=0),
        "num_workers": 0,
    }
    data = open_dataset(dataset_config(variant, roots), "train")
    if variant == "one root":
        plan = SamplingPlan(
            [r.frames for r in data.recordings],
            [r.labelled for r in data.recordings],
            lanes=LANES,
            sequence_length=LENGTH,
            sampling=Sampling.mixed,
            seed=0,
        )
    else:
        from evspan.pipeline.data.sampling import sampling_plan

        if variant == "repeat factors":
            config["repeat_factor_threshold"] = 0.9
        plan = sampling_plan(data, TrainingConfig(**config), seed=0)
    training = TrainingConfig(**config)
    return Loader(data, plan, range(LANES), range(LENGTH), training, seed=0)


def measure(variant: str, roots: list[Path], frames: int, number: int) -> dict[str, float]:
    """frames per second of CPU time, us per chunk of the plan, ms to open."""
    keep_freed_memory()
    started = time.thread_time()
    loader = loader_of(variant, roots)
    opened = time.thread_time() - started
    batches = max(1, frames // (LANES * LENGTH))
    loader.encoded_batch(number * batches)
    started = time.thread_time()
    for index in range(number * batches, (number + 1) * batches):
        loader.encoded_batch(index)
    seconds = time.thread_time() - started
    started = time.thread_time()
    for index in range(CHUNKS // LANES):
        for lane in range(LANES):
            loader.plan.chunk(lane, index)
    planning = time.thread_time() - started
    return {
        "frames/s": batches * LANES * LENGTH / seconds,
        "us a chunk": 1e6 * planning / CHUNKS,
        "ms to open": 1e3 * opened,
    }


def measure_with(
    python: str, variant: str, args: argparse.Namespace, number: int
) -> dict[str, float]:
    """`measure` in a process of its own."""
    words = ["--folder", str(args.folder), "--frames", str(args.frames)]
    command = [python, __file__, *words, "--variant", variant, "--round", str(number)]
    values: dict[str, float] = json.loads(subprocess.check_output(command, timeout=600))
    return values


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--frames", type=int, default=2000)
    parser.add_argument("--baseline")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--round", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        roots = [args.folder / name / "shards" for name in ("a", "b")]
        print(json.dumps(measure(args.variant, roots, args.frames, args.round)))
        return
    with TemporaryDirectory(prefix="evspan-") as temporary:
        args.folder = args.folder or Path(temporary)
        prepare(args.folder)
        from common import print_machine

        print_machine()
        sides = [(variant, sys.executable) for variant in VARIANTS]
        if args.baseline:
            sides.insert(0, ("one root", args.baseline))
        rounds: dict[tuple[str, str], list[dict[str, float]]] = {side: [] for side in sides}
        for number in range(args.repeats):
            for side in sides:
                rounds[side].append(measure_with(side[1], side[0], args, number))
    for (variant, python), values in rounds.items():
        name = "baseline, one root" if python == args.baseline else variant
        medians = [f"{median(v[key] for v in values):.1f} {key}" for key in values[0]]
        print(f"{name}: {', '.join(medians)}")


if __name__ == "__main__":
    main()
