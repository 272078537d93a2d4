"""`evspan simulate`: folders of simulated recordings with boxes, ready for `evspan prep`."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.conf.text import plural
from evspan.data_prep.shards.format import SPLITS
from evspan.data_prep.simulator import SimulatorConfig
from evspan.data_prep.simulator.domains import DOMAINS, domain_of
from evspan.data_prep.simulator.recording_set import (
    SUFFIXES,
    SimulatedRecording,
    SimulatedSet,
    is_complete,
    remove_unplanned,
    write_recordings,
)
from evspan.launch.cli.command import Parser, reported_errors
from evspan.launch.output_streams import drop_lost_output

DESCRIPTION = """Recordings of moving textured balls, boxes and bars, with boxes at 60 Hz. OUT/train
has train_000_td.raw, train_000_bbox.npy and train_000_simulation.json (the parameters), and so on;
OUT/classes.txt has the names of the classes. The same seed gives the same recordings. Run again, it
simulates only what is missing."""
EXAMPLES = """examples:
  evspan simulate raw --recordings train=8,val=2 --seconds 10
  evspan simulate raw --recordings val=1 --format h5 --seed 7 --noise-hz 1 --objects 1,3
  evspan simulate night --domain night --noise-hz 2,8       # each recording its own rate
  evspan prep source=raw output=shards dataset=simulated        # then"""


RANGE_OPTIONS = {
    "stop_fraction": "fraction of the objects that stop",
    "noise_hz": "background events per pixel and second",
    "contrast_threshold": "change of log intensity that fires",
    "threshold_mismatch": "standard deviation of the thresholds over the pixels, relative",
    "refractory_us": "time after an event in which a pixel fires none",
    "hot_pixels": "pixels that fire without a cause",
    "hot_pixel_hz": "mean rate of a hot pixel",
    "speed": "factor on the speeds of the objects",
    "object_contrast": "factor on the contrast of the objects",
    "background_contrast": "factor on the contrast of the background",
    "background_texture": "log intensity of a fine texture of the background",
    "clutter": "plain patches in the background",
    "ego_speed": "largest speed of the background in pixels per second; 0: it is at rest",
}


@dataclass(frozen=True)
class SimulateOptions:
    """What to simulate, and how."""

    recording_set: SimulatedSet
    processes: int  # recordings at once; 0: one per core
    overwrite: bool


def simulate_all(options: SimulateOptions) -> None:
    """Simulates what is missing; prints a line for each recording.

    Raises:
        UserError: the folder has recordings that were made in another way or are not part of the
            set, and `overwrite` is false.
    """
    recording_set = options.recording_set
    recordings = recording_set.recordings()
    missing = [
        recording
        for recording in recordings
        if not is_complete(recording, overwrite=options.overwrite)
    ]
    num_removed = remove_unplanned(recording_set, overwrite=options.overwrite)
    if num_removed:
        print(
            f"{recording_set.folder}: deleted {plural(num_removed, 'recording')} outside this set"
        )
    recording_set.write_classes()
    recording_set.write_domain()
    if len(missing) < len(recordings):
        print(
            f"{recording_set.folder}: {len(recordings) - len(missing)} of "
            f"{len(recordings)} recordings are there already"
        )
    for number, result in enumerate(write_recordings(missing, options.processes), 1):
        print(f"[{number}/{len(missing)}] {_line(result)}", flush=True)


def _line(result: SimulatedRecording) -> str:
    report = result.report
    millions = report.events / 1e6
    return (
        f"{report.path}: {millions:.1f} M events ({millions / result.planned.seconds:.2f} M/s), "
        f"{report.boxes} boxes of {report.tracks} objects, {result.wall_seconds:.1f} s"
    )


def options_from(args: argparse.Namespace) -> SimulateOptions:
    """Raises UserError for a number out of its range."""
    if args.processes < 0 or args.seed < 0:
        raise UserError(f"--processes {args.processes} --seed {args.seed}: give 0 or more of both")
    if not 0 < args.seconds <= 2000:
        raise UserError(f"--seconds is {args.seconds:g}; give more than 0 and up to 2000")
    ranges = {}
    for name in RANGE_OPTIONS:
        limits = getattr(args, name)
        if limits is not None:
            ranges[name] = limits
    if args.scales is not None:
        min_scale, max_scale = args.scales
        ranges |= {"min_scale": (min_scale, min_scale), "max_scale": (max_scale, max_scale)}
    if args.rest_s is not None:
        min_rest, max_rest = args.rest_s
        ranges |= {"min_rest_s": (min_rest, min_rest), "max_rest_s": (max_rest, max_rest)}
    min_objects, max_objects = args.objects
    base = SimulatorConfig(
        height=args.height, width=args.width, min_objects=min_objects, max_objects=max_objects
    )
    recording_set = SimulatedSet(
        folder=args.out,
        counts=args.recordings,
        seconds=args.seconds,
        seed=args.seed,
        format=args.format,
        domain=domain_of(args.domain, base, ranges),
    )
    return SimulateOptions(recording_set, args.processes, args.overwrite)


def _counts(text: str) -> dict[str, int]:
    counts = {}
    for part in text.split(","):
        split, _, number = part.partition("=")
        if split not in SPLITS or not number.isdecimal():
            raise argparse.ArgumentTypeError(
                f"{text!r} is not of the form train=8,val=2 (splits: {', '.join(SPLITS)})"
            )
        counts[split] = int(number)
    return counts


def _range(text: str) -> tuple[float, float]:
    try:
        low, _, high = text.partition(",")
        return float(low), float(high or low)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number nor of the form LOW,HIGH"
        ) from None


def _limits(text: str) -> tuple[float, float]:
    try:
        low, high = text.split(",")
        return float(low), float(high)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form 0.5,1.5 (smallest and largest value)"
        ) from None


def _objects(text: str) -> tuple[int, int]:
    try:
        low, high = text.split(",")
        return int(low), int(high)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form 2,8 (fewest and most at once)"
        ) from None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "evspan simulate",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument(
        "--recordings",
        type=_counts,
        default={"train": 8, "val": 2},
        metavar="SPLIT=N,...",
        help="number of recordings per split (default: train=8,val=2)",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each (default: 10)")
    parser.add_argument(
        "--seed", type=int, default=0, help="same seed, same recordings (default: 0)"
    )
    parser.add_argument(
        "--format", choices=sorted(SUFFIXES), default="raw", help="raw is EVT3 (default: raw)"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=0,
        metavar="N",
        help="recordings at once; 0: one per core (default: 0)",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace recordings that were made with other parameters, and delete those that are "
        "not part of the set: more of its splits, or of another domain",
    )
    _add_scene(parser)
    return parser


def _add_scene(parser: argparse.ArgumentParser) -> None:
    default = SimulatorConfig()
    scene = parser.add_argument_group(
        "scene and sensor",
        "X[,Y]: a value, or a range in which each recording draws its own; they replace those of "
        "the domain",
    )
    scene.add_argument(
        "--domain",
        choices=list(DOMAINS),
        default="default",
        help="kind of recordings, for studies of generalisation; data_prep/README.md has a table",
    )
    scene.add_argument(
        "--width", type=int, default=default.width, help=f"pixels (default: {default.width})"
    )
    scene.add_argument(
        "--height", type=int, default=default.height, help=f"pixels (default: {default.height})"
    )
    scene.add_argument(
        "--objects",
        type=_objects,
        default=(default.min_objects, default.max_objects),
        metavar="MIN,MAX",
        help=f"objects at once (default: {default.min_objects},{default.max_objects})",
    )
    scene.add_argument(
        "--scales",
        type=_limits,
        metavar="MIN,MAX",
        help="factor on the size of an object, drawn for each "
        f"(default: {default.min_scale:g},{default.max_scale:g})",
    )
    scene.add_argument(
        "--rest-s",
        type=_limits,
        metavar="MIN,MAX",
        help="seconds that an object rests where it stops, drawn for each "
        f"(default: {default.min_rest_s:g},{default.max_rest_s:g})",
    )
    for name, meaning in RANGE_OPTIONS.items():
        scene.add_argument(
            f"--{name.replace('_', '-')}",
            type=_range,
            metavar="X[,Y]",
            help=f"{meaning} (default: {getattr(default, name):g})",
        )


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = _parser().parse_args(argv)
    drop_lost_output()
    with reported_errors():
        simulate_all(options_from(args))


if __name__ == "__main__":
    main()
