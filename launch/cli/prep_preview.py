"""`evspan prep preview`: frames with their boxes as an image or an animation."""

import argparse
from pathlib import Path

from evspan.conf.text import plural
from evspan.data_prep.preview import (
    ANIMATION_FRAMES,
    DOWNSAMPLE,
    SHEET_FRAMES,
    WINDOW_MS,
    PreviewOptions,
    write_preview,
)
from evspan.data_prep.shards.format import SPLITS
from evspan.launch.cli.command import Parser, reported_errors
from evspan.launch.output_streams import drop_lost_output

DESCRIPTION = """\
Draws frames with their boxes. A .png is a sheet of frames, evenly spaced over the time span; a .gif
or .mp4 plays all of them.

INPUT is a recording (.raw, .dat, .h5; the boxes of X_bbox.npy next to X_td.raw are drawn), a folder
that evspan prep wrote, or one of its shards. Brighter is blue, darker is red, both is violet."""
EXAMPLES = """examples:
  evspan prep preview drive_td.raw drive.png
  evspan prep preview still.raw still.png --frames 1 --window-ms 2000
  evspan prep preview drive_td.raw drive.mp4 --from 10 --frames 100 --downsample 1
  evspan prep preview SHARDS sheet.png --split val --recording drive
  evspan prep preview SHARDS/train/00000.h5 shard.gif"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "evspan prep preview",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="INPUT")
    parser.add_argument("out", type=Path, metavar="OUT", help="a file ending in .png, .gif or .mp4")
    parser.add_argument(
        "--recording", metavar="NAME", help="of a prepared dataset (default: its first)"
    )
    parser.add_argument("--split", choices=SPLITS, help="of a prepared dataset (default: any)")
    parser.add_argument(
        "--from",
        dest="from_s",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="start, in seconds since the recording's first event (default: 0)",
    )
    parser.add_argument(
        "--frames",
        type=int,
        metavar="N",
        help=f"at most N frames (default: {SHEET_FRAMES} in a .png, "
        f"{ANIMATION_FRAMES} in an animation)",
    )
    parser.add_argument(
        "--downsample",
        type=int,
        choices=(1, 2, 4),
        help=f"of a recording (default: {DOWNSAMPLE}); the frames of shards are downsampled",
    )
    parser.add_argument(
        "--window-ms",
        type=int,
        metavar="MS",
        help=f"length of a frame's window, of a recording (default: {WINDOW_MS}); "
        "longer windows show more of a sparse recording",
    )
    parser.add_argument(
        "--classes",
        type=_names,
        default=[],
        metavar="A,B,...",
        help="names of class 0, 1, ... of a recording's boxes",
    )
    return parser


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def preview(options: PreviewOptions) -> None:
    """Writes the preview and prints what it shows."""
    summary = write_preview(options)
    frames = plural(summary.frames, "frame")
    print(f"{options.out}: {frames} of {summary.name} with {summary.boxes} boxes")


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    options = PreviewOptions(**vars(_parser().parse_args(argv)))
    drop_lost_output()
    with reported_errors():
        preview(options)


if __name__ == "__main__":
    main()
