"""`evspan prep verify`: whether shards still hold what was written, and the frames that their recordings give."""

import argparse
import os
import sys
from contextlib import closing, nullcontext
from pathlib import Path

from evspan.conf.errors import RecordingError
from evspan.data_prep.recordings.sources import find_sources
from evspan.data_prep.shards.atomic import locked
from evspan.data_prep.shards.check import Task, Verified, verify_recording
from evspan.data_prep.shards.format import load_manifest
from evspan.data_prep.shards.marks import read_marks, write_marks
from evspan.data_prep.workers import results_of
from evspan.launch.cli.command import Parser
from tqdm import tqdm

DAMAGED_EXIT_CODE = 1

DESCRIPTION = """Recomputes all checksums, checks that boxes, times and offsets fit together, and compares frames with those that
recordings give, where --source has them. Exit code 0: all is sound, 1: something is damaged, 2: it could not be verified."""
EXAMPLES = """What is damaged is marked in SHARDS/.damaged; the same evspan prep again redoes it alone.

examples:
  evspan prep verify shards                            checksums and structure
  evspan prep verify shards --source raw               and a few frames of each recording
  evspan prep verify shards --source list.txt --all    and every frame"""


def verify(
    root: Path,
    source: Path | None = None,
    *,
    sample: int | None = 3,
    seed: int = 0,
    processes: int = 0,
) -> dict[str, str]:
    """What is damaged, by split/recording; it is marked, so that the next `evspan prep` redoes it alone.

    Args:
        source: the recordings' folder, or their list; without it, no frames are recomputed. sample: how many of each
            recording, None: all. processes: 0: one per core.
    Raises:
        ShardError: `root` is no prepared dataset. RecordingError: the source is not there, or that of something else.
        UserError: another process writes to it.
    """
    sources = {s.key: s for s in find_sources(source)} if source else {}
    load_manifest(root)  # who names another folder should not find a lock in it
    writable = os.access(root, os.W_OK)
    with locked(root, "evspan prep verify") if writable else nullcontext():
        manifest = load_manifest(root)
        listed = {f"{r.split}/{r.name}": r for r in manifest.recordings}
        if sources and not sources.keys() & listed.keys():
            raise RecordingError(
                f"source {source} has none of the recordings of {root} ({min(sources)}, ...). Give what evspan "
                "prep was given as source"
            )
        absent = f"{source} does not have it" if source else ""
        tasks = [
            Task(root, r, manifest.config, sources.get(key), absent, sample, seed)
            for key, r in listed.items()
        ]
        results = _run(tasks, processes)
        damaged = {
            key: f"marked earlier: {why.removeprefix('marked earlier: ')}"
            for key, why in read_marks(root).items()
        }
        damaged |= {key: "; ".join(r.problems) for key, r in results.items() if r.problems}
        if writable:
            write_marks(root, damaged)
    _tell(root, source, results, damaged, writable)
    return damaged


def _run(tasks: list[Task], processes: int) -> dict[str, Verified]:
    """A bar on a terminal, a line per recording otherwise."""
    results: dict[str, Verified] = {}
    with (
        closing(results_of(tasks, verify_recording, processes)) as verified,
        tqdm(total=len(tasks), desc="verifying", unit="recording", disable=None) as bar,
    ):
        for number, (task, result) in enumerate(verified, 1):
            done = results[task.key] = result()
            line = f"[{number}/{len(tasks)}] {task.key}: {_told(done)}"
            if bar.disable:
                print(line, flush=True)
            elif done.problems or done.not_compared:
                bar.write(line)
            bar.update()
    return results


def _told(result: Verified) -> str:
    if result.problems:
        return f"damaged: {'; '.join(result.problems)}"
    if result.not_compared:
        return f"sound, but not compared with its recording: {result.not_compared}"
    return f"sound{f', {result.compared} frames as its recording gives them' if result.compared else ''}"


def _tell(
    root: Path,
    source: Path | None,
    results: dict[str, Verified],
    damaged: dict[str, str],
    writable: bool,
) -> None:
    for key in sorted(damaged.keys() - {k for k, r in results.items() if r.problems}):
        print(f"{key}: damaged: {damaged[key]}")
    sound = [r for key, r in results.items() if key not in damaged]
    compared = [r.compared for r in sound if r.compared]
    print(
        f"{root}: {len(sound)} of {len(results)} recordings are sound; {sum(compared)} frames of {len(compared)} "
        f"compared with the recordings{'' if source else ' (--source RAW compares a few of each)'}"
    )
    if damaged and writable:
        print(
            f"{root}: {len(damaged)} damaged, and marked: run the same evspan prep again, which redoes no others"
        )
    elif damaged:
        print(
            f"{root}: {len(damaged)} damaged, and not marked, since you may not write to it: let who may run the same, then "
            "evspan prep"
        )


def _not_negative(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def main(argv: list[str]) -> None:
    parser = Parser(
        "evspan prep verify",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", type=Path)
    parser.add_argument("--source", type=Path, help="what prep was given as source")
    frames = parser.add_mutually_exclusive_group()
    frames.add_argument(
        "--sample",
        type=_not_negative,
        default=3,
        metavar="N",
        help="frames to compare per recording, 3",
    )
    frames.add_argument("--all", action="store_true", help="compare every frame")
    parser.add_argument("--seed", type=_not_negative, default=0, help="other frames are sampled, 0")
    parser.add_argument("--processes", type=_not_negative, default=0, help="0: one per core")
    given = parser.parse_args(argv)
    if verify(
        given.shards,
        given.source,
        sample=None if given.all else given.sample,
        seed=given.seed,
        processes=given.processes,
    ):
        sys.exit(DAMAGED_EXIT_CODE)
