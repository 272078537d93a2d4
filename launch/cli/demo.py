"""`make demo`: simulates, prepares, trains, evaluates and infers; prints metrics and times."""

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from evspan.launch.cli.command import Parser, report_error, reported_errors
from evspan.launch.demo import (
    MODULE,
    REQUIRED_AP50,
    SECONDS,
    TRAIN_RECORDINGS,
    VAL_RECORDINGS,
    DemoResult,
    PartFailedError,
    run_demo,
)
from evspan.launch.output_streams import drop_lost_output

METRIC_NAMES = {
    "ap": "AP 0.50:0.95",
    "ap50": "AP50",
    "ap_small": "AP small",
    "ap_medium": "AP medium",
    "ap_large": "AP large",
}
NAME_WIDTH = 14  # of the column of names
DESCRIPTION = f"""Simulates {TRAIN_RECORDINGS} + {VAL_RECORDINGS} recordings, prepares them,
trains on {TRAIN_RECORDINGS}, evaluates on the other {VAL_RECORDINGS} and draws detections over one
of them. Starts from the beginning: the files of an earlier demo in the folder are removed."""


@dataclass(frozen=True)
class DemoOptions:
    """Options of the demo. keep: use the parts that an earlier demo has completed."""

    folder: Path
    keep: bool


def parse_options(argv: list[str] | None) -> DemoOptions:
    """Options from the arguments; sys.argv for None."""
    parser = Parser(f"python -m {MODULE}", description=DESCRIPTION)
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("demo"), metavar="FOLDER", help="default: demo"
    )
    parser.add_argument(
        "--continue",
        dest="keep",
        action="store_true",
        help="use the parts that an earlier demo has completed, with the times they took",
    )
    args = parser.parse_args(argv)
    return DemoOptions(args.folder, args.keep)


def demo(options: DemoOptions) -> int:
    """Runs the demo and prints its results; returns the exit code.

    Raises:
        UserError: the folder contains files that are not a demo's.
    """
    try:
        result = run_demo(options.folder, options.keep)
    except PartFailedError as error:
        report_error(str(error))
        return error.exit_code
    print("\n" + "\n".join(result_lines(result)) + "\n", flush=True)
    if not result.passed:
        report_error(
            f"AP50 is {result.metrics['ap50'] or 0:.3f}, below {REQUIRED_AP50:.2f}: the detector "
            "has not learnt enough. Look at loss/total in TensorBoard, and at the overlay"
        )
    print(last_line(result), flush=True)
    return 0 if result.passed else 1


def result_lines(result: DemoResult) -> list[str]:
    """The metrics, the time of each part, and where the results are."""
    total = sum(result.times.values())
    lines = [
        f"{VAL_RECORDINGS} recordings of {SECONDS} s; the detector was trained on "
        f"{TRAIN_RECORDINGS} others",
        "",
    ]
    for key, name in METRIC_NAMES.items():
        value = result.metrics[key]
        text = "-" if value is None else f"{value:.3f}"
        lines.append(f"  {name:{NAME_WIDTH}}{text:>8}")
    lines.append("")
    for name, seconds in (*result.times.items(), ("total", total)):
        lines.append(f"  {name:{NAME_WIDTH}}{seconds:>8.1f} s")
    overlays = sorted((result.folder / "detections").glob("*_overlay.*"))
    overlay = overlays[0] if overlays else "-"
    logs = result.folder / "run" / "tensorboard"
    lines += [
        "",
        f"  {'overlay':{NAME_WIDTH}}{overlay}",
        f"  {'TensorBoard':{NAME_WIDTH}}{logs}",
        f"  {'to open it':{NAME_WIDTH}}{_tensorboard_command(logs)}",
    ]
    return lines


def _tensorboard_command(logs: Path) -> str:
    installed = Path(sys.executable).with_name("tensorboard")
    program = os.path.relpath(installed) if installed.exists() else "tensorboard"
    return shlex.join([program, "--logdir", str(logs)])


def last_line(result: DemoResult) -> str:
    """A line for scripts: AP, AP50 and the total time."""
    ap = result.metrics["ap"] or 0
    ap50 = result.metrics["ap50"] or 0
    return f"demo: ap={ap:.3f} ap50={ap50:.3f} seconds={sum(result.times.values()):.0f}"


def main(argv: list[str] | None = None) -> None:
    """Runs the demo."""
    options = parse_options(argv)
    drop_lost_output()
    with reported_errors():
        sys.exit(demo(options))


if __name__ == "__main__":
    main()
