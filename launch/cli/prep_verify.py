"""`evspan prep verify`: checks shards, and compares them with their recordings."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evspan.data_prep.shards.verify import VerifyReport, verify
from evspan.launch.cli.command import Parser

DAMAGED_EXIT_CODE = 1

DESCRIPTION = """\
Recomputes all checksums, checks that boxes, times and offsets fit together, and compares frames
with those of the recordings, where --source has them. Exit code 0: all is sound, 1: something is
damaged, 2: it could not be verified. SHARDS may also be RVT's tree: files, labels, times and frames
are checked."""
EXAMPLES = """\
Damaged recordings are marked in SHARDS/.damaged; the same evspan prep prepares only them again.

examples:
  evspan prep verify shards                            checksums and structure
  evspan prep verify shards --source raw               and a few frames of each recording
  evspan prep verify shards --source list.txt --all    and every frame"""


@dataclass(frozen=True)
class Options:
    """Options of the command. sample: frames to compare per recording; None: all."""

    shards: Path
    source: Path | None
    sample: int | None
    seed: int
    processes: int


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _parse(argv: Sequence[str]) -> Options:
    parser = Parser(
        "evspan prep verify",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", type=Path)
    parser.add_argument("--source", type=Path, help="the source of prep")
    frames = parser.add_mutually_exclusive_group()
    frames.add_argument(
        "--sample",
        type=_not_negative,
        default=3,
        metavar="N",
        help="frames to compare per recording (default: 3)",
    )
    frames.add_argument("--all", action="store_true", help="compare every frame")
    parser.add_argument(
        "--seed", type=_not_negative, default=0, help="selects the frames (default: 0)"
    )
    parser.add_argument(
        "--processes", type=_not_negative, default=0, help="0: one per core (default)"
    )
    args = parser.parse_args(argv)
    sample = None if args.all else args.sample
    return Options(args.shards, args.source, sample, args.seed, args.processes)


def print_report(root: Path, report: VerifyReport, *, has_source: bool) -> None:
    """Prints recordings that were marked earlier, and totals."""
    results = report.results
    for key in sorted(report.damaged):
        if key not in results or not results[key].problems:
            print(f"{key}: damaged: {report.damaged[key]}")
    sound = [result for key, result in results.items() if key not in report.damaged]
    compared = [result.compared for result in sound if result.compared]
    hint = "" if has_source or report.is_tree else " (--source RAW compares a few of each)"
    print(
        f"{root}: {len(sound)} of {len(results)} recordings are sound; {sum(compared)} frames of "
        f"{len(compared)} compared with the recordings{hint}"
    )
    if not report.damaged:
        return
    if report.is_tree:
        print(f"{root}: {len(report.damaged)} damaged: copy or prepare these recordings again")
    elif report.marked:
        print(
            f"{root}: {len(report.damaged)} damaged, and marked: run the same evspan prep again, "
            "which prepares only them"
        )
    else:
        print(
            f"{root}: {len(report.damaged)} damaged, and not marked, since you may not write to "
            "it: ask someone with write access to run the same, then evspan prep"
        )


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    options = _parse(argv)
    report = verify(
        options.shards,
        options.source,
        sample=options.sample,
        seed=options.seed,
        processes=options.processes,
    )
    print_report(options.shards, report, has_source=options.source is not None)
    if report.damaged:
        sys.exit(DAMAGED_EXIT_CODE)
