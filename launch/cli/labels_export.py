"""`evspan labels export`: boxes, detections and frames for other tools."""

import argparse
from pathlib import Path

from evspan.conf.text import plural, printable
from evspan.data_prep.labels.interchange.exporting import (
    ExportOptions,
    ExportSummary,
    export_labels,
)
from evspan.data_prep.labels.interchange.formats import FORMATS
from evspan.data_prep.labels.interchange.pictures import EVERY_MS, WINDOW_MS, PictureOptions
from evspan.launch.cli.command import Parser, reported_errors
from evspan.launch.cli.labels_import import parse_names, parse_size
from evspan.launch.cli.recording_options import add_time_unit_option, time_unit
from evspan.launch.output_streams import drop_lost_output

DESCRIPTION = """Boxes or detections -> COCO, YOLO, Pascal VOC, CVAT, CSV or MOT; frames -> images.

SOURCE is a box file (X_bbox.npy), a folder of them (the output of evspan infer or evaluate), a run
with one evaluation, a recording, a folder of recordings without boxes, or shards. Of recordings and
shards the frames are drawn, too, and with --frames those of the recordings that boxes belong to.
Images have the sensor's size and are named by the end of their window
(drive_000000050000us.png), so that evspan labels import needs no options for what a labelling tool
saves.

Without labels there is an image every 100 ms, which is how often prep takes a label
(dataset.labels.label_every_ms); with labels there is one at each of their times.

YOLO, COCO, VOC and CSV put all recordings into one OUT; CVAT and MOT make a folder for each."""
EXAMPLES = """examples:
  evspan labels export drive.raw pictures
  evspan labels export drive.raw pictures --every-ms 200 --window-ms 100
  evspan labels export drive_bbox.npy drive.json --format coco --classes car,person
  evspan labels export detections for_cvat --format cvat --frames raw/val --confidence 0.3
  evspan labels export SHARDS yolo --format yolo"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "evspan labels export",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder, or a .json or .csv file")
    parser.add_argument(
        "--format", choices=FORMATS, help="of the labels (default: frames only, without labels)"
    )
    parser.add_argument(
        "--frames", type=Path, metavar="PATH", help="recording, folder of recordings, or shards"
    )
    parser.add_argument(
        "--every-ms",
        type=int,
        metavar="MS",
        help=f"time between images (default: {EVERY_MS}, or one at each time of a label)",
    )
    parser.add_argument(
        "--window-ms",
        type=int,
        default=WINDOW_MS,
        metavar="MS",
        help=f"span of events in an image (default: {WINDOW_MS})",
    )
    parser.add_argument(
        "--classes",
        type=parse_names,
        default=[],
        metavar="A,B,...",
        help="names of class 0, 1, ... (default: classes.txt next to the boxes)",
    )
    parser.add_argument(
        "--size", type=parse_size, metavar="WxH", help="of the sensor (default: the recording's)"
    )
    add_time_unit_option(parser)
    parser.add_argument(
        "--confidence",
        type=float,
        default=0.0,
        metavar="C",
        help="leave out detections under it (default: 0)",
    )
    parser.add_argument("--overwrite", action="store_true", help="write into a folder with files")
    return parser


def _options(argv: list[str]) -> ExportOptions:
    args = _parser().parse_args(argv)
    return ExportOptions(
        source=args.source,
        out=args.out,
        format=args.format,
        frames=args.frames,
        pictures=PictureOptions(
            window_ms=args.window_ms,
            every_ms=args.every_ms,
            sensor_size=args.size[::-1] if args.size else None,
            time_unit=time_unit(args),
        ),
        classes=args.classes,
        size=args.size,
        confidence=args.confidence,
        overwrite=args.overwrite,
    )


def _print(summary: ExportSummary, options: ExportOptions) -> None:
    """Prints what was written, what was left out, and the next command."""
    out = printable(str(options.out))
    parts = [f"{plural(summary.frames, 'frame')} of {plural(summary.recordings, 'recording')}"]
    if options.format:
        parts.append("1 box" if summary.boxes == 1 else f"{summary.boxes:,} boxes")
    if summary.images:
        parts.append(plural(summary.images, "image"))
    print(f"{', '.join(parts)} -> {out}")
    if summary.unpictured and options.format:
        print(
            f"left out: {summary.unpictured:,} boxes at times without an image (--every-ms, and "
            "windows of other lengths, reach others)"
        )
    if summary.unsupported:
        print(f"left out: {plural(summary.unsupported, 'ignore region')}, which YOLO lacks")
    if summary.images:
        print("next: label the images, save as COCO, YOLO, VOC or CVAT, and then")
        print("  evspan labels import FILE FOLDER_OF_THE_RECORDINGS")


def main(argv: list[str]) -> None:
    """Runs the command."""
    with reported_errors():
        options = _options(argv)
        drop_lost_output()
        _print(export_labels(options), options)
