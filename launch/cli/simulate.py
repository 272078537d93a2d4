"""`evspan simulate`: folders of simulated recordings with boxes, ready for `evspan prep`."""

import argparse
import dataclasses
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from evspan.conf.errors import UserError
from evspan.data_prep.shards.format import SPLITS
from evspan.data_prep.simulator import SimulationReport, SimulatorConfig, simulate
from evspan.launch.cli.command import Parser, run_command

SIMULATOR_VERSION = 1  # to be raised when the same parameters give other bytes
SUFFIXES = {"raw": "_td.raw", "dat": "_td.dat", "h5": "_td.h5"}
DESCRIPTION = """Recordings of moving textured balls, boxes and bars, with boxes at 60 Hz, deterministic by seed:
OUT/train/train_000_td.raw, train_000_bbox.npy and train_000_simulation.json (the parameters), and so on."""
EXAMPLES = """examples:
  evspan simulate raw --recordings train=8,val=2 --seconds 10
  evspan simulate raw --recordings val=1 --format h5 --seed 7 --noise-hz 1 --objects 1,3
  evspan prep source=raw output=shards        # then"""


class Job(NamedTuple):
    path: Path
    seconds: float
    seed: int
    config: SimulatorConfig

    @property
    def stem(self) -> str:
        return self.path.name.rsplit("_td", 1)[0]

    @property
    def note(self) -> Path:
        """Written last: it stands for a complete recording."""
        return self.path.with_name(f"{self.stem}_simulation.json")

    def parameters(self) -> dict[str, Any]:
        return {
            "version": SIMULATOR_VERSION,
            "format": self.path.suffix[1:],
            "seconds": self.seconds,
            "seed": self.seed,
            **dataclasses.asdict(self.config),
        }


def jobs_of(
    out: Path,
    counts: dict[str, int],
    *,
    seconds: float,
    seed: int,
    kind: str,
    config: SimulatorConfig,
) -> list[Job]:
    """One per recording. Each has a seed of its own, which depends on `seed`, its split and its number alone."""

    def seed_of(split: str, index: int) -> int:
        return int(np.random.SeedSequence([seed, SPLITS.index(split), index]).generate_state(1)[0])

    return [
        Job(out / split / f"{split}_{i:03d}{SUFFIXES[kind]}", seconds, seed_of(split, i), config)
        for split, count in counts.items()
        for i in range(count)
    ]


def is_done(job: Job, overwrite: bool = False) -> bool:
    """The recording lies there with its boxes, made with the same parameters.

    Raises:
        UserError: something of its name is there that was made in another way, and is not to be overwritten.
    """
    there = [
        p
        for p in (job.path.with_name(job.stem + suffix) for suffix in SUFFIXES.values())
        if p.exists()
    ]
    if not there:
        return False
    try:
        made_with = (
            dataclasses.asdict(SimulatorConfig()) | json.loads(job.note.read_text())["parameters"]
        )  # of older notes
    except (OSError, ValueError, KeyError):
        if overwrite:
            return False
        raise UserError(
            f"{there[0]} is there, but {job.note.name} does not tell how it was made. "
            "Give another folder, or --overwrite to replace it"
        ) from None
    wanted = job.parameters()
    if there == [job.path] and made_with == wanted:
        return job.path.with_name(f"{job.stem}_bbox.npy").exists()
    if overwrite:
        return False
    differs = [
        f"{k} {made_with.get(k)} instead of {v}" for k, v in wanted.items() if made_with.get(k) != v
    ]
    raise UserError(
        f"{there[0]} is there, made with {', '.join(differs) or 'more than one format'}. "
        "Give another folder, or --overwrite to replace it"
    )


def run_job(job: Job) -> tuple[Job, SimulationReport, float]:
    began = time.perf_counter()
    for (
        suffix
    ) in SUFFIXES.values():  # not two recordings of one name, and no note without its recording
        job.path.with_name(job.stem + suffix).unlink(missing_ok=True)
    job.note.unlink(missing_ok=True)
    report = simulate(job.path, seconds=job.seconds, seed=job.seed, config=job.config)
    beside = job.note.with_name(f".{job.note.name}.{os.getpid()}.writing")
    note = {"parameters": job.parameters(), "events": report.events, "boxes": report.boxes}
    beside.write_text(json.dumps(note, indent=1) + "\n")
    os.replace(beside, job.note)
    return job, report, time.perf_counter() - began


def run_jobs(jobs: list[Job], processes: int) -> None:
    """All jobs, a line each when it is done."""

    def told(number: int, done: tuple[Job, SimulationReport, float]) -> None:
        job, report, took = done
        rate = report.events / job.seconds / 1e6
        print(
            f"[{number}/{len(jobs)}] {job.path}: {report.events / 1e6:.1f} M events ({rate:.2f} M/s), {report.boxes} boxes of "
            f"{report.tracks} objects, {took:.1f} s",
            flush=True,
        )

    workers = min(processes or len(os.sched_getaffinity(0)), len(jobs))
    if workers <= 1:
        for number, job in enumerate(jobs, 1):
            told(number, run_job(job))
        return
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        for number, future in enumerate(
            as_completed([pool.submit(run_job, job) for job in jobs]), 1
        ):
            told(number, future.result())
    finally:
        pool.shutdown(cancel_futures=True)


def _counts(text: str) -> dict[str, int]:
    try:
        counts = {split: int(n) for split, n in (part.split("=") for part in text.split(","))}
    except ValueError:
        counts = {}
    if not counts or not set(counts) <= set(SPLITS) or min(counts.values()) < 0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form train=8,val=2 (splits: {', '.join(SPLITS)})"
        )
    return counts


def _scales(text: str) -> tuple[float, float]:
    try:
        low, high = (float(n) for n in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form 0.5,1.5 (smallest and largest factor)"
        ) from None
    return low, high


def _objects(text: str) -> tuple[int, int]:
    try:
        low, high = (int(n) for n in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form 2,8 (fewest and most at once)"
        ) from None
    return low, high


def _parser() -> argparse.ArgumentParser:
    default = SimulatorConfig()
    parser = Parser(
        "evspan simulate",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument(
        "--recordings",
        type=_counts,
        default={"train": 8, "val": 2},
        metavar="SPLIT=N,...",
        help="how many of each split (default: train=8,val=2)",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each (default: 10)")
    parser.add_argument(
        "--seed", type=int, default=0, help="same seed, same recordings (default: 0)"
    )
    parser.add_argument(
        "--format", choices=sorted(SUFFIXES), default="raw", help="raw is EVT3 (default: raw)"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=0,
        metavar="N",
        help="at once; 0: one per core (default: 0)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace recordings that were made with other parameters",
    )
    scene = parser.add_argument_group("scene and sensor")
    scene.add_argument(
        "--width", type=int, default=default.width, help=f"pixels (default: {default.width})"
    )
    scene.add_argument(
        "--height", type=int, default=default.height, help=f"pixels (default: {default.height})"
    )
    scene.add_argument(
        "--objects",
        type=_objects,
        default=(default.min_objects, default.max_objects),
        metavar="MIN,MAX",
        help=f"at once (default: {default.min_objects},{default.max_objects})",
    )
    scene.add_argument(
        "--scales",
        type=_scales,
        default=(default.min_scale, default.max_scale),
        metavar="MIN,MAX",
        help=f"factor on objects' sizes, drawn for each (default: {default.min_scale:g},{default.max_scale:g})",
    )
    for name, meaning in (
        ("stop_fraction", "of the objects that stop on their way"),
        ("noise_hz", "background events per pixel and second"),
        ("contrast_threshold", "change of log intensity that fires"),
    ):
        value = getattr(default, name)
        scene.add_argument(
            f"--{name.replace('_', '-')}",
            type=float,
            default=value,
            metavar="X",
            help=f"{meaning} (default: {value:g})",
        )
    return parser


def simulate_all(given: argparse.Namespace) -> None:
    if given.processes < 0 or given.seed < 0:
        raise UserError(
            f"--processes {given.processes} --seed {given.seed}: give 0 or more of both"
        )
    if not 0 < given.seconds <= 2000:
        raise UserError(f"--seconds is {given.seconds:g}; give more than 0 and up to 2000")
    config = SimulatorConfig(
        height=given.height,
        width=given.width,
        min_objects=given.objects[0],
        max_objects=given.objects[1],
        min_scale=given.scales[0],
        max_scale=given.scales[1],
        stop_fraction=given.stop_fraction,
        noise_hz=given.noise_hz,
        contrast_threshold=given.contrast_threshold,
    )
    jobs = jobs_of(
        given.out,
        given.recordings,
        seconds=given.seconds,
        seed=given.seed,
        kind=given.format,
        config=config,
    )
    todo = [job for job in jobs if not is_done(job, given.overwrite)]
    if len(todo) < len(jobs):
        print(f"{given.out}: {len(jobs) - len(todo)} of {len(jobs)} recordings are there already")
    if todo:
        run_jobs(todo, given.processes)


def main(argv: list[str] | None = None) -> None:
    given = _parser().parse_args(argv)
    run_command(lambda: simulate_all(given))


if __name__ == "__main__":
    main()
