"""`evspan status`: shows the state of a sweep's runs. It changes nothing."""

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from evspan.conf.errors import UserError
from evspan.launch.cli.command import Parser, reported_errors
from evspan.launch.cli.table import format_table
from evspan.launch.output_streams import write_control
from evspan.launch.sweep.registry import RunList, describe_all, read_runs
from evspan.launch.sweep.status import NUMBERS, as_json, status_rows, watch_runs

DESCRIPTION = """Shows the runs of a sweep, or a single run: state, step, AP of the newest
evaluation, estimated time to the end (without evaluations), node, number of requeues, last error.
It reads the runs' files and SLURM's queue; sacct is not needed.

  waiting    in SLURM's queue, and why
  running    (starting: no step yet)
  requeued   waits for its next attempt
  saved      stopped by a signal after saving; start it again to continue
  lost       ended without a record, and not in the queue
  done, failed, cancelled"""
EXAMPLES = """examples:
  evspan status sweeps/lr
  evspan status sweeps/lr --watch           repeat every few seconds until all runs have ended
  evspan status runs/demo --json"""
CLEAR_SCREEN = "\033[H\033[2J"


@dataclass(frozen=True)
class StatusOptions:
    """Options of `evspan status`. interval_s: seconds between repetitions with --watch."""

    path: Path
    json: bool
    watch: bool
    interval_s: float

    def __post_init__(self) -> None:
        if self.interval_s < 1:
            raise UserError(
                f"--every is {self.interval_s:g}; give 1 s or more: all users share SLURM's "
                "controller"
            )


def parse_options(argv: list[str] | None) -> StatusOptions:
    """Options from the arguments after `evspan status`; sys.argv for None."""
    parser = Parser(
        "evspan status",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="folder of a run or of a sweep")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--watch", action="store_true", help="repeat until all runs have ended")
    parser.add_argument(
        "--every",
        type=float,
        default=5.0,
        metavar="S",
        help="seconds between repetitions with --watch (default: 5)",
    )
    args = parser.parse_args(argv)
    return StatusOptions(args.path, args.json, args.watch, args.every)


def status(options: StatusOptions) -> None:
    """Prints the state of the runs.

    Raises:
        UserError: there is no run.
    """
    if options.json:
        print_json(options.path, read_runs(options.path))
    elif options.watch:
        for run_list in watch_runs(options.path, options.interval_s):
            if sys.stdout.isatty():
                write_control(CLEAR_SCREEN)
            print(f"{options.path}  {time.strftime('%H:%M:%S')}")
            print_status(run_list)
    else:
        print_status(read_runs(options.path))


def print_json(path: Path, run_list: RunList) -> None:
    """Prints the runs as JSON."""
    runs = [as_json(run) for run in run_list.runs]
    print(json.dumps({"path": str(path), "runs": runs, "note": run_list.note}, indent=1))


def print_status(run_list: RunList) -> None:
    """Prints the runs as a table; on a terminal its lines are cut to the terminal's width."""
    rows = status_rows(run_list.runs)
    numbers = [i for i, heading in enumerate(rows[0]) if heading in NUMBERS]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    lines = format_table(rows, right_aligned=numbers, width=width)
    if len(run_list.runs) > 1:
        lines.append(describe_all(run_list.runs))
    if run_list.note:
        lines.append(states_note(run_list.note))
    print("\n".join(lines), flush=True)


def states_note(note: str) -> str:
    """The line under a table of runs whose jobs could not be read from SLURM's queue."""
    return f"note: {note}; the states come from the runs' files"


def main(argv: list[str] | None = None) -> None:
    """Runs `evspan status`."""
    with reported_errors():
        status(parse_options(argv))


if __name__ == "__main__":
    main()
