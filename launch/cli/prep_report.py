"""`evspan prep report`: what a prepared dataset holds, as one page of HTML to read before training."""

import argparse
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.data_prep.report.findings import findings
from evspan.data_prep.report.markup import printable
from evspan.data_prep.report.page import page
from evspan.data_prep.report.survey import FRAMES_PER_RECORDING, survey
from evspan.data_prep.shards.atomic import written_whole
from evspan.data_prep.shards.format import SPLITS
from evspan.launch.cli.command import Parser, run_command

DESCRIPTION = """Splits, labels, classes, sizes, events over time, drops and pictures of a prepared dataset, in total and per
recording, with what looks wrong at the top. The page needs no network and no other file. Only a few frames of a recording
are read."""
EXAMPLES = """examples:
  evspan prep report SHARDS                        writes SHARDS_report.html beside the folder
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
        help="default: SHARDS_report.html beside the folder",
    )
    parser.add_argument("--split", choices=SPLITS, help="only this one")
    parser.add_argument("--recording", metavar="NAME", help="only the one of this name")
    parser.add_argument(
        "--frames-per-recording",
        type=int,
        default=FRAMES_PER_RECORDING,
        metavar="N",
        help=f"frames that are decoded, evenly spread (default: {FRAMES_PER_RECORDING})",
    )
    return parser


def report(given: argparse.Namespace) -> None:
    root = given.shards.resolve()
    out = given.out or root.with_name(f"{root.name}_report.html")
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{out} does not end in .html; name the page so")
    if out.resolve().is_relative_to(root):
        raise UserError(
            f"{out} lies inside {given.shards}, where evspan prep allows no other files; name a place outside"
        )
    if given.frames_per_recording < 1:
        raise UserError(f"--frames-per-recording {given.frames_per_recording}: give 1 or more")
    surveyed = survey(
        given.shards,
        split=given.split,
        name=given.recording,
        frames_per_recording=given.frames_per_recording,
    )
    found = findings(surveyed)
    with written_whole(out) as beside, beside.open("w", encoding="utf-8") as file:
        file.writelines(page(surveyed, found))
    print(
        f"{out}: {len(surveyed.recordings)} recording{'s' if len(surveyed.recordings) != 1 else ''}, "
        f"{len(found) or 'no'} warning{'s' if len(found) != 1 else ''}"
    )
    for warning in found:
        print(f"  {printable(warning)}")


def main(argv: list[str] | None = None) -> None:
    given = _parser().parse_args(argv)
    run_command(lambda: report(given))


if __name__ == "__main__":
    main()
