"""`evspan logs`: prints the logs of a run's ranks."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from evspan.conf.text import printable_lines
from evspan.launch.cli.command import Parser, reported_errors
from evspan.launch.hang import hang_lines
from evspan.launch.sweep.logs import LogSelection, read_logs

DESCRIPTION = """Prints the log of a rank, attempt after attempt (RUN/logs/rank-00.log). Rank 0
logs the losses and AP. --metrics prints its numbers instead: RUN/metrics.jsonl, one JSON object
for each logged step and each evaluation. --hang asks the ranks of a run that makes no progress what
they do: the collective that each one waits in, which rank is missing, and the Python stacks. Of a
run that has ended it prints what its ranks reported last."""
EXAMPLES = """examples:
  evspan logs sweeps/lr/3
  evspan logs sweeps/lr/3 --follow --lines 20
  evspan logs sweeps/lr/3 --all --lines 5
  evspan logs runs/demo --metrics
  evspan logs sweeps/lr/3 --hang"""


@dataclass(frozen=True)
class LogsOptions:
    """Options of `evspan logs`."""

    run: Path
    selection: LogSelection
    hang: bool = False


def parse_options(argv: list[str] | None) -> LogsOptions:
    """Options from the arguments after `evspan logs`; sys.argv for None."""
    parser = Parser(
        "evspan logs",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="folder of a run, such as one of a sweep"
    )
    ranks = parser.add_mutually_exclusive_group()
    ranks.add_argument("--rank", type=int, metavar="N", help="the log of rank N (default: 0)")
    ranks.add_argument(
        "--all", action="store_true", help="the logs of all ranks, each line with its rank"
    )
    ranks.add_argument(
        "--metrics", action="store_true", help="metrics.jsonl: losses, speed and AP as JSON"
    )
    ranks.add_argument(
        "--hang",
        action="store_true",
        help="what every rank waits for, and which one is missing; with the Python stacks",
    )
    parser.add_argument(
        "--follow",
        "-f",
        action="store_true",
        help="continue with new lines until the run has ended",
    )
    parser.add_argument(
        "--lines", "-n", type=int, metavar="N", help="start with the last N lines (default: all)"
    )
    args = parser.parse_args(argv)
    if args.hang and (args.follow or args.lines is not None):
        parser.error("--hang prints no log; leave out --follow and --lines")
    selection = LogSelection(
        rank=args.rank,
        all_ranks=args.all,
        follow=args.follow,
        last_lines=args.lines,
        metrics=args.metrics,
    )
    return LogsOptions(args.run, selection, hang=args.hang)


def logs(options: LogsOptions) -> None:
    """Prints the selected lines, or what the ranks do.

    Raises:
        UserError: there is no such run or log, or no rank has reported what it does.
    """
    if options.hang:
        for line in hang_lines(options.run):
            print(printable_lines(line), flush=True)
        return
    for line in read_logs(options.run, options.selection):
        print(printable_lines(line), flush=options.selection.follow)


def main(argv: list[str] | None = None) -> None:
    """Runs `evspan logs`."""
    with reported_errors():
        logs(parse_options(argv))


if __name__ == "__main__":
    main()
