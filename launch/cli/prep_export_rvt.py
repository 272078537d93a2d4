"""`evspan prep export-rvt`: shards of frames.mode=rvt to the folders that RVT reads."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evspan.conf.text import plural
from evspan.data_prep.shards.export_rvt import ExportReport, export_rvt
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
        "writes. Run again, it does only what is missing. Ignore regions, and the labels of frames "
        "without boxes, are left out and counted: RVT has none.",
        epilog="example: evspan prep export-rvt shards rvt_tree --split train val",
    )
    parser.add_argument("shards", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", nargs="+", choices=SPLITS, default=SPLITS, help="default: all")
    args = parser.parse_args(argv)
    return Options(args.shards, args.out, tuple(args.split))


def _left_out(report: ExportReport) -> list[str]:
    """What the recordings of the tree lack."""
    parts: list[str] = []
    if report.ignore_regions:
        regions = plural(report.ignore_regions, "ignore region")
        parts.append(f"left out {regions}, which RVT's format does not have")
    if report.negatives:
        frames = plural(report.negatives, "labelled frame")
        parts.append(f"left out {frames} without boxes, as RVT does")
    return parts


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
    parts += _left_out(report)
    print("; ".join(parts))
