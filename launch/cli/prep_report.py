"""`evspan prep report`: the contents of a prepared dataset as one HTML page."""

import argparse
from pathlib import Path

from evspan.conf.text import plural
from evspan.data_prep.report.build import ReportOptions, write_report
from evspan.data_prep.report.markup import printable
from evspan.data_prep.report.survey import FRAMES_PER_RECORDING
from evspan.data_prep.shards.format import SPLITS
from evspan.launch.cli.command import Parser, reported_errors
from evspan.launch.output_streams import drop_lost_output

DESCRIPTION = """\
Writes a page with the splits, labels, classes, box sizes, events over time, dropped events and
boxes, and sample frames of a prepared dataset, in total and per recording. Warnings are at the top.
The page needs no network and no other file. Only a few frames of each recording are decoded."""
EXAMPLES = """examples:
  evspan prep report SHARDS                        writes SHARDS_report.html next to the folder
  evspan prep report SHARDS val.html --split val --frames-per-recording 50"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "evspan prep report",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "shards", type=Path, metavar="SHARDS", help="a folder that evspan prep wrote"
    )
    parser.add_argument(
        "out",
        type=Path,
        nargs="?",
        metavar="OUT.html",
        help="default: SHARDS_report.html next to the folder",
    )
    parser.add_argument("--split", choices=SPLITS, help="only this split")
    parser.add_argument("--recording", metavar="NAME", help="only the recording of this name")
    parser.add_argument(
        "--frames-per-recording",
        type=int,
        default=FRAMES_PER_RECORDING,
        metavar="N",
        help=f"frames that are decoded, evenly spaced (default: {FRAMES_PER_RECORDING})",
    )
    return parser


def report(options: ReportOptions) -> None:
    """Writes the page and prints its warnings."""
    summary = write_report(options)
    recordings = plural(summary.recordings, "recording")
    if summary.warnings:
        warnings = plural(len(summary.warnings), "warning")
    else:
        warnings = "no warnings"
    print(f"{summary.path}: {recordings}, {warnings}")
    for warning in summary.warnings:
        print(f"  {printable(warning)}")


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    options = ReportOptions(**vars(_parser().parse_args(argv)))
    drop_lost_output()
    with reported_errors():
        report(options)


if __name__ == "__main__":
    main()
