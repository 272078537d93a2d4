"""`evspan prep export-rvt`: shards of frames.mode=rvt to the folders that RVT reads."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evspan.conf.text import plural
from evspan.data_prep.shards.export_rvt import export_rvt
from evspan.data_prep.shards.format import SPLITS
from evspan.launch.cli.command import Parser
from evspan.launch.output_streams import drop_lost_output

NAMED = 3  # recordings without labels that are named


@dataclass(frozen=True)
class Options:
    """Options of the command."""

    shards: Path
    out: Path
    splits: tuple[str, ...]


def _parse(argv: Sequence[str]) -> Options:
    parser = Parser(
        "evspan prep export-rvt",
        description="Shards of frames.mode=rvt to the tree that RVT's preprocess_dataset.py "
        "writes. Run again, it does only what is missing.",
        epilog="example: evspan prep export-rvt shards rvt_tree --split train val",
    )
    parser.add_argument("shards", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", nargs="+", choices=SPLITS, default=SPLITS, help="default: all")
    args = parser.parse_args(argv)
    return Options(args.shards, args.out, tuple(args.split))


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    options = _parse(argv)
    drop_lost_output()
    start = time.perf_counter()
    report = export_rvt(options.shards, options.out, options.splits)
    seconds = time.perf_counter() - start
    written = plural(len(report.written), "recording")
    parts = [f"{options.out}: {written} written in {seconds:.1f} s"]
    if report.existing:
        parts.append(f"{len(report.existing)} there already")
    if report.unlabelled:
        names = ", ".join(report.unlabelled[:NAMED])
        if len(report.unlabelled) > NAMED:
            names += ", ..."
        parts.append(f"{len(report.unlabelled)} without labels left out, as RVT does ({names})")
    print("; ".join(parts))
