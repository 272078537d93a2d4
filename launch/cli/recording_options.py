"""Options of commands that read recordings which do not state their sensor or unit of time."""

import argparse

from evspan.conf.schema.prep import TimeUnit
from evspan.launch.cli.labels_import import parse_size


def add_recording_options(parser: argparse.ArgumentParser) -> None:
    """Adds --sensor-size and --time-unit."""
    parser.add_argument(
        "--sensor-size",
        type=parse_size,
        metavar="WxH",
        help="of recordings that do not state it, in pixels (default: 1280x720, with a warning)",
    )
    add_time_unit_option(parser)


def add_time_unit_option(parser: argparse.ArgumentParser) -> None:
    """Adds --time-unit."""
    parser.add_argument(
        "--time-unit",
        choices=[unit.name for unit in TimeUnit],
        help="of the times of .csv, .txt and .npz (default: where it is certain, that of the file)",
    )


def sensor_hw(args: argparse.Namespace) -> tuple[int, int] | None:
    """(height, width) of --sensor-size."""
    return args.sensor_size[::-1] if args.sensor_size else None


def time_unit(args: argparse.Namespace) -> TimeUnit | None:
    """The unit of --time-unit."""
    return TimeUnit[args.time_unit] if args.time_unit else None
