"""`evspan labels pseudo`: a trained detector labels recordings."""

import argparse
import shlex
import sys
from dataclasses import asdict, fields, replace
from enum import Enum
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.conf.schema.prep import FrameConfig, FrameMode, LabelConfig, TimeUnit
from evspan.conf.text import plural
from evspan.launch.cli.command import Parser, reported_errors
from evspan.launch.cli.existing_files import add_overwrite_option, require_new
from evspan.launch.cli.recording_options import add_recording_options, sensor_hw, time_unit
from evspan.launch.output_streams import drop_lost_output
from evspan.pipeline.pseudo_labels.options import (
    Counts,
    FilterOptions,
    PseudoOptions,
    PseudoSummary,
    Thresholds,
)

DESCRIPTION = """Pseudo-labels of a trained detector for recordings with few labels or none, after
LEOD (Wu et al., CVPR 2024).

RUN is a run folder, a checkpoint folder or a weights file. SOURCE is what evspan prep takes: a
recording, a folder, or a list. The detector runs over each recording forward and backward in time;
the detections of both are merged and tracked in both directions. Those above the thresholds of
their class, in tracks that are long in either direction, become boxes. Those in short tracks, those
under the thresholds, and gaps in tracks become ignore regions: the loss has no background term in
them. Box files next to the recordings are kept: frames with labels get no others.

OUT/X_bbox.npy      boxes and ignore regions; class ids are the detector's
OUT/classes.txt     names of the classes
OUT/recordings.txt  the recordings with these box files, for evspan prep source=OUT/recordings.txt
OUT/summary.json    counts by recording and class

The last line that is printed is the command that prepares the labels with the detector's frames. A
recording that cannot be read does not stop the others; the exit code is 2 then.

The defaults are LEOD's: thresholds of 0.3 for pedestrians and two-wheelers and 0.6 for others,
tracks of at least 6 frames."""
EXAMPLES = """examples:
  evspan labels pseudo runs/tiny raw pseudo
  evspan prep source=pseudo/recordings.txt output=shards-pseudo
  evspan labels pseudo runs/tiny raw pseudo --thresholds 0.5,pedestrian=0.3"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "evspan labels pseudo",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="RUN", help="the detector")
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the recordings")
    parser.add_argument("output", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument(
        "--split",
        choices=("train", "val", "test"),
        default="train",
        help="recordings of SOURCE to label, and their split in the list (default: train)",
    )
    _add_filters(parser)
    labels = parser.add_argument_group("labels that there are")
    labels.add_argument(
        "--no-labels", action="store_true", help="leave the box files next to recordings out"
    )
    labels.add_argument(
        "--class-map",
        type=parse_class_map,
        metavar="ID:ID,...",
        help="class id in the box files : the detector's; others are left out (default: the same)",
    )
    labels.add_argument(
        "--label-every-ms",
        type=int,
        default=PseudoOptions.label_every_ms,
        metavar="MS",
        help="distance of pseudo-labels, as dataset.labels.label_every_ms (default: 100)",
    )
    labels.add_argument(
        "--label-time-unit",
        choices=[unit.name for unit in TimeUnit],
        default=TimeUnit.us.name,
        help="of the times in box files (default: us); what is written is in us",
    )
    labels.add_argument(
        "--label-offset-us",
        type=int,
        default=0,
        metavar="US",
        help="is added to these times, as dataset.labels.offset_us (default: 0)",
    )
    add_recording_options(parser)
    _add_inference(parser)
    add_overwrite_option(parser)
    return parser


def _add_filters(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what becomes a box")
    group.add_argument(
        "--thresholds",
        type=parse_thresholds,
        default=Thresholds(),
        metavar="C,CLASS=C,...",
        help="of objectness and class score: of all classes, and of some (default: 0.6, and 0.3 of "
        "pedestrian, person, two_wheeler, bicycle, cyclist, motorbike)",
    )
    group.add_argument(
        "--class-thresholds",
        type=parse_thresholds,
        metavar="C,CLASS=C,...",
        help="of the class score (default: as --thresholds)",
    )
    numbers = {
        "--confidence": ("C", "detections below (objectness x class score) are left out"),
        "--nms-iou": ("IOU", "detections of both directions that overlap more are one"),
        "--match-iou": ("IOU", "lowest IoU of a box with its track's predicted place"),
        "--gap-ms": ("MS", "a track ends when it has no box for longer"),
        "--min-track-ms": ("MS", "shorter tracks become ignore regions"),
        "--min-side": ("PX", "boxes with a shorter side are left out"),
        "--max-width-fraction": ("F", "wider boxes are left out, as a fraction of the sensor"),
    }
    for option, (metavar, text) in numbers.items():
        default = getattr(FilterOptions, option[2:].replace("-", "_"))
        group.add_argument(
            option,
            type=float,
            default=default,
            metavar=metavar,
            help=f"{text} (default: {default:g})",
        )
    group.add_argument(
        "--no-uncertain-regions",
        action="store_true",
        help="leave out what is under the thresholds, as LEOD does",
    )
    group.add_argument(
        "--no-gap-regions", action="store_true", help="no ignore regions in gaps of tracks"
    )


def _add_inference(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("inference")
    group.add_argument("--forward-only", action="store_true", help="half the time, fewer boxes")
    group.add_argument(
        "--weights",
        choices=("ema", "raw"),
        default="ema",
        help="of a checkpoint: the moving average of its weights, where it has one (default), or "
        "those that the optimizer updates",
    )
    group.add_argument("--device", metavar="DEVICE", help="cpu, cuda (default: cuda if available)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads of the network")
    group.add_argument(
        "--frames-per-call",
        type=int,
        default=PseudoOptions.frames_per_call,
        metavar="N",
        help="frames that the network takes at once (default: 4)",
    )


def parse_thresholds(text: str) -> Thresholds:
    """The thresholds of a text such as 0.5,pedestrian=0.3."""
    default = Thresholds.default
    by_class: dict[str, float] = {}
    try:
        for part in text.split(","):
            name, equals, value = part.strip().rpartition("=")
            if equals:
                by_class[name.strip()] = float(value)
            else:
                default = float(value)
        return Thresholds(default, by_class, strict=True)
    except (ValueError, UserError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of thresholds from 0 to 1, such as 0.6,pedestrian=0.3"
        ) from error


def parse_class_map(text: str) -> dict[int, int]:
    """The map of a text such as 0:0,3:1."""
    class_map: dict[int, int] = {}
    try:
        for part in text.split(","):
            source, _, target = part.partition(":")
            class_map[int(source)] = int(target)
    except ValueError:
        class_map = {}
    if not class_map or min(*class_map, *class_map.values()) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no map of class ids, such as 0:0,3:1")
    return class_map


def _options(argv: list[str]) -> PseudoOptions:
    args = _parser().parse_args(argv)
    for name in ("label_every_ms", "frames_per_call", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; give 1 or more")
    names = {f.name for f in fields(FilterOptions)}
    values = {name: value for name, value in vars(args).items() if name in names}
    filters = FilterOptions(
        **values,
        objectness=args.thresholds,
        class_score=args.class_thresholds or args.thresholds,
        uncertain_regions=not args.no_uncertain_regions,
        gap_regions=not args.no_gap_regions,
    )
    return PseudoOptions(
        checkpoint=args.checkpoint,
        source=args.source,
        output=args.output,
        filters=filters,
        split=args.split,
        keep_labels=not args.no_labels,
        class_map=args.class_map,
        label_every_ms=args.label_every_ms,
        label_time_unit=TimeUnit[args.label_time_unit],
        label_offset_us=args.label_offset_us,
        sensor_size=sensor_hw(args),
        time_unit=time_unit(args),
        backward=not args.forward_only,
        weights=args.weights,
        frames_per_call=args.frames_per_call,
        device=args.device,
        threads=args.threads,
        overwrite=args.overwrite,
    )


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    with reported_errors():
        options = _options(sys.argv[1:] if argv is None else argv)
        from evspan.pipeline.pseudo_labels.generate import (
            LIST_FILE,
            label_recordings,
            output_files,
        )

        require_new(output_files(options), overwrite=options.overwrite)
        drop_lost_output()
        path = options.output / LIST_FILE
        summaries: list[PseudoSummary] = []
        try:
            for summary in label_recordings(options):
                print(_recording_line(summary), flush=True)
                summaries.append(summary)
        finally:
            if summaries and path.is_file():  # the list is complete, perhaps without some
                print(_table(summaries))
                print(f"next: {prep_command(path, summaries[0].config, options)}", flush=True)


def prep_command(path: Path, config: FrameConfig, options: PseudoOptions) -> str:
    """The command that prepares the labels of a list with the detector's frames.

    RVT's frames are counted exactly: its preparation does not support the rate of the labels.
    """
    words = [f"source={path}", "output=SHARDS"]
    default = asdict(FrameConfig())
    for key, value in asdict(replace(config, mode=FrameMode.exact)).items():
        if value != default[key]:
            words.append(f"frames.{key}={_setting(value)}")
    if options.label_every_ms != LabelConfig.label_every_ms:
        words.append(f"dataset.labels.label_every_ms={options.label_every_ms}")
    if options.sensor_size is not None:
        height, width = options.sensor_size
        words.append(f"dataset.sensor_size=[{height},{width}]")
    if options.time_unit is not None:
        words.append(f"dataset.time_unit={options.time_unit.name}")
    return shlex.join(["evspan", "prep", *words])


def _setting(value: object) -> str:
    return value.name if isinstance(value, Enum) else str(value)


def _recording_line(summary: PseudoSummary) -> str:
    boxes = sum(counts.pseudo_boxes for counts in summary.per_class.values())
    noun = "pseudo-box" if boxes == 1 else "pseudo-boxes"
    return (
        f"{summary.boxes}: {boxes} {noun}, "
        f"{summary.labelled_frames} of {plural(summary.frames, 'frame')} labelled"
    )


def _table(summaries: list[PseudoSummary]) -> str:
    """The counts of all recordings, a line for each class."""
    names = [f.name for f in fields(Counts)]
    titles = [name.replace("_", " ") for name in names]
    total: dict[str, list[int]] = {}
    for summary in summaries:
        for class_name, counts in summary.per_class.items():
            row = total.setdefault(class_name, [0] * len(names))
            for i, name in enumerate(names):
                row[i] += getattr(counts, name)
    width = max(len(name) for name in ("class", *total))
    lines = [f"{'class':<{width}}" + "".join(f"{title:>14}" for title in titles)]
    for class_name, row in total.items():
        lines.append(f"{class_name:<{width}}" + "".join(f"{number:>14}" for number in row))
    return "\n".join(lines)
