"""`evspan labels import`: labels of other tools -> box files."""

import argparse
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.conf.text import plural, printable
from evspan.data_prep.labels.interchange.formats import FORMATS
from evspan.data_prep.labels.interchange.importing import (
    ImportOptions,
    ImportSummary,
    import_labels,
)
from evspan.data_prep.labels.interchange.timing import Timing
from evspan.launch.cli.command import Parser, reported_errors
from evspan.launch.output_streams import drop_lost_output

DESCRIPTION = """Labels of other tools -> box files (X_bbox.npy) for evspan prep, and classes.txt.

FILE is COCO JSON; a YOLO folder (data.yaml, classes.txt or obj.names); a folder of Pascal VOC XML;
CVAT XML 1.1, for video (tracks) or images; a CSV table (columns time_us, x, y, w, h, class and
optionally track_id, recording, confidence, ignore); or MOT's gt.txt or det.txt. Its format is
recognised. OUT is the folder of the recordings, or the box file of one: drive_bbox.npy.

Times: images of evspan labels export carry the time in their names, and need no option. Other
images and videos are numbered: frame k is at offset + k * period, from --fps or --frame-ms. An
image of accumulated events shows what came before its end: its time is the end of its window.

Boxes are in pixels of the image, and are scaled if the sensor has another size (--size,
--recording, or that of the recording in OUT). COCO's iscrowd, VOC's difficult and MOT's ignored
rows become ignore regions."""
EXAMPLES = """examples:
  evspan labels import annotations.json raw/train
  evspan labels import tracks.xml raw/train/drive_bbox.npy --fps 30 --offset-us 1200000
  evspan labels import yolo_folder raw/train --size 1280x720
  evspan labels import MOT17-02 raw/val --recording drive_td.raw --fps 30"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "evspan labels import",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("labels", type=Path, metavar="FILE", help="file or folder of labels")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder, or X_bbox.npy")
    parser.add_argument("--format", choices=FORMATS, help="default: recognised from the content")
    period = parser.add_mutually_exclusive_group()
    period.add_argument(
        "--fps", type=_positive, metavar="N", help="frames per second (29.97, or 30000/1001)"
    )
    period.add_argument(
        "--frame-ms", type=_positive, metavar="MS", help="time from one frame to the next"
    )
    parser.add_argument(
        "--offset-us",
        type=int,
        default=0,
        metavar="US",
        help="time of frame 0 on the recording's clock; is added to times in names and tables",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="FOLDER",
        help="the labelled images: frame k is the k-th by name; also gives their size",
    )
    parser.add_argument(
        "--recording", type=Path, metavar="FILE", help="the recording: its name and sensor size"
    )
    parser.add_argument(
        "--size",
        type=parse_size,
        metavar="WxH",
        help="of the sensor, in pixels (default: the recording's, else the images')",
    )
    parser.add_argument(
        "--classes",
        type=parse_names,
        default=[],
        metavar="A,B,...",
        help="names of class 0, 1, ... (default: classes.txt of OUT, else the labels' order)",
    )
    parser.add_argument(
        "--drop-other-classes", action="store_true", help="leave out boxes of other classes"
    )
    parser.add_argument(
        "--empty-frames",
        choices=("negative", "unlabelled"),
        default="negative",
        help="what frames without boxes are: negatives to learn from (default), or not labelled",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace box files")
    return parser


def _positive(text: str) -> float:
    """A number above 0, or a fraction of two."""
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        value = 0.0
    if not 1e-6 <= value <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of a text such as 1280x720."""
    match = re.fullmatch(r"([1-9]\d{0,4})[xX,]([1-9]\d{0,4})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, for example 1280x720")
    return int(match[1]), int(match[2])


def parse_names(text: str) -> list[str]:
    """The names of a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _options(argv: list[str]) -> ImportOptions:
    args = _parser().parse_args(argv)
    period_us = None
    if args.fps:
        period_us = 1e6 / args.fps
    elif args.frame_ms:
        period_us = 1e3 * args.frame_ms
    if args.images and not args.images.is_dir():
        raise UserError(f"--images {args.images} is no folder. Give the one with the images")
    return ImportOptions(
        labels=args.labels,
        out=args.out,
        format=args.format,
        timing=Timing(period_us, args.offset_us),
        classes=args.classes,
        drop_other_classes=args.drop_other_classes,
        size=args.size,
        images=args.images,
        recording=args.recording,
        keep_empty=args.empty_frames == "negative",
        overwrite=args.overwrite,
    )


def _lines(summary: ImportSummary, options: ImportOptions) -> Iterator[str]:
    """What was imported, what was changed, and the next command."""
    target = printable(str(summary.files[0]))
    if len(summary.files) > 1:
        target = f"{plural(len(summary.files), 'box file')} in {printable(str(options.out))}"
    frames = "1 frame" if summary.frames == 1 else f"{summary.frames:,} frames"
    tracks = f", {plural(summary.tracks, 'track')}" if summary.tracks else ""
    yield (
        f"{_boxes(summary.boxes)} of {_classes(len(summary.boxes_per_class))} in "
        f"{frames}, "
        f"{summary.first_us / 1e6:.3f} s to {summary.last_us / 1e6:.3f} s{tracks} -> {target}"
    )
    per_class = ", ".join(f"{n:,} {name}" for name, n in summary.boxes_per_class.items())
    yield f"classes in {summary.classes_file}: {per_class}"
    if summary.ignored:
        yield f"ignore regions: {summary.ignored:,}"
    if summary.empty:
        meaning = "negatives (--empty-frames unlabelled changes that)"
        if not options.keep_empty:
            meaning = "left out"
        yield f"frames without boxes: {summary.empty:,}, {meaning}"
    for size in sorted(summary.scaled):
        yield f"boxes of images of {size[0]} x {size[1]} pixels were scaled to the sensor"
    for size in sorted(summary.unscaled):
        yield (
            f"boxes are in pixels of images of {size[0]} x {size[1]}; if the sensor has another "
            "size, give --size or --recording, and --overwrite"
        )
    if summary.clipped:
        yield f"cut at the border of the picture: {_boxes(summary.clipped)}"
    if summary.outside or summary.flat:
        yield (
            f"left out: {_boxes(summary.outside)} outside the picture, {summary.flat:,} without "
            "an area"
        )
    if summary.dropped:
        listed = ", ".join(f"{n:,} {name}" for name, n in summary.dropped.most_common(10))
        yield f"left out, of other classes: {listed}"
    yield f"next: evspan prep source={printable(str(summary.source))} output=shards"


def _boxes(count: int) -> str:
    return "1 box" if count == 1 else f"{count:,} boxes"


def _classes(count: int) -> str:
    return "1 class" if count == 1 else f"{count} classes"


def main(argv: list[str]) -> None:
    """Runs the command."""
    with reported_errors():
        options = _options(argv)
        drop_lost_output()
        summary = import_labels(options)
        for line in _lines(summary, options):
            print(line)
